"""Forwards through a model's cache: one, those of a whole text, and a clock that waits for the device.

A single forward over a text attends exactly and would hide the compression. Here a text is fed in pieces,
teacher-forced: a position reads the tokens sealed before its piece from the latents, and the sinks, the window and its
own piece exactly. With a first piece of `sinks + window + group` tokens and pieces of `group`, pieces begin where
groups are sealed, so that this equals token-by-token decoding and costs `group` times fewer forwards.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cskv.errors import CacheError, DataError
from cskv.models.compat import cache_kwarg, output_cache
from cskv.models.placement import device_of

Piece = tuple[int, int]


@torch.no_grad()
def forward(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    cache: Cache | None = None,
    *,
    last_only: bool = False,
    seen: int | None = None,
    mask: Int[Tensor, "batch all"] | None = None,
) -> tuple[Float[Tensor, "batch kept vocabulary"], Cache]:
    """Append tokens to a cache, a fresh one when None, and return (logits, cache), without gradients.

    Args:
        model: a decoder, attached or not.
        input_ids: what follows the cached tokens.
        cache: what an earlier call returned; it is changed in place.
        last_only: compute the logits of the last position only, as generation does after a prefill.
        seen: tokens before these. None lets the model ask the cache, which is wrong of one that has dropped some.
        mask: 1 for every real token and 0 for padding on the left, the cached ones included; None where there is none.

    Raises:
        CacheError: the model returns no cache.
    """
    kwargs: dict[str, Any] = {cache_kwarg(model): cache, "use_cache": True}
    device = device_of(model)
    known = inspect.signature(model.forward).parameters
    if last_only and "logits_to_keep" in known:
        kwargs["logits_to_keep"] = 1
    if mask is not None:
        kwargs["attention_mask"] = mask.to(device)
    if "position_ids" in known and mask is not None:
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :].to(device)
    elif "position_ids" in known and seen is not None:
        kwargs["position_ids"] = torch.arange(seen, seen + input_ids.shape[1], device=device)[None]
    outputs = model(input_ids=input_ids.to(device), **kwargs)
    filled = output_cache(outputs)
    if filled is None:
        raise CacheError(
            f"{type(model).__name__} returned no cache; expected a decoder model that supports use_cache=True"
        )
    return outputs.logits[:, -1:] if last_only else outputs.logits, filled


def pieces(length: int, first: int, piece: int, prefix: int = 0) -> list[Piece]:
    """Return (start, stop) of every forward over `length` tokens: a prefix, `first` tokens, then `piece` at a time."""
    starts = [prefix] if 0 < prefix < length else []
    return list(itertools.pairwise([0, *starts, *range(prefix + first, length, piece), length]))


def read(
    model: PreTrainedModel,
    rows: Int[Tensor, "batch tokens"],
    parts: Iterable[Piece],
    cache: Cache | None = None,
    *,
    skipped: int = 0,
) -> Iterator[tuple[Piece, Float[Tensor, "batch kept vocabulary"]]]:
    """Feed texts piece by piece through one cache, and yield each piece with the logits of its positions.

    Memory is that of the cache and of the logits of one piece.

    Args:
        model: attached or not.
        rows: token ids that need no mask: not padded, or on the right.
        parts: see `pieces`.
        cache: an empty one; the model's own when None.
        skipped: of a piece that ends before this position only the last logits are computed.
    """
    for start, stop in parts:
        logits, cache = forward(model, rows[:, start:stop], cache, last_only=stop <= skipped, seen=start)
        yield (start, stop), logits


def check_least(least: int, **numbers: int) -> None:
    """Refuse numbers below `least`.

    Raises:
        DataError: the first of them.
    """
    for name, number in numbers.items():
        if number < least:
            raise DataError(f"{name} is {number}; expected at least {least}")


def clock(device: torch.device) -> float:
    """Return seconds of a monotonic clock, once the device's queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""One forward through a model's own cache, and a clock that waits for the device."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cskv.errors import CacheError
from cskv.models.compat import cache_kwarg, output_cache


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
    if last_only and "logits_to_keep" in inspect.signature(model.forward).parameters:
        kwargs["logits_to_keep"] = 1
    if mask is not None:
        kwargs["attention_mask"] = mask.to(model.device)
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :].to(model.device)
    elif seen is not None:
        kwargs["position_ids"] = torch.arange(seen, seen + input_ids.shape[1], device=model.device)[None]
    outputs = model(input_ids=input_ids.to(model.device), **kwargs)
    filled = output_cache(outputs)
    if filled is None:
        raise CacheError(
            f"{type(model).__name__} returned no cache; expected a decoder model that supports use_cache=True"
        )
    return outputs.logits[:, -1:] if last_only else outputs.logits, filled


def clock(device: torch.device) -> float:
    """Seconds of a monotonic clock, once the device's queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

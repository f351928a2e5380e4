"""The logits of whole texts as the compressed cache sees them, right-padded batches included.

A single forward over a text attends exactly and would hide the compression. Fed in chunks that begin where groups are
sealed, every position reads what it would read when the text is decoded token by token (`cskv.evaluation.perplexity`).
Rows that are padded on the right need no mask: they all begin at position 0, no real token attends to a later one, and
a group is read only by queries behind it, so that it holds no padding when a real token reads it.
"""

from __future__ import annotations

import inspect
import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import device_of
from cskv.compression.reading import compressed_reading
from cskv.errors import CacheError
from cskv.evaluation.forward import forward
from cskv.models.compat import output_cache
from cskv.models.survey import Survey


def chunked_logits(model: PreTrainedModel, rows: Tensor, window: int, group: int, keep: int) -> Tensor:
    """Feed texts through the model's own cache, compressed when it is attached.

    Memory is that of the cache, of the logits of one chunk, and of the result.

    Args:
        model: attached or not.
        rows: (batch, tokens) ids, padded on the right or not at all.
        window, group: of the cache.
        keep: how many of the last positions are wanted; the language-model head is spared the others.

    Returns:
        (batch, keep, vocabulary) logits, or all positions' where there are fewer.
    """
    length = rows.shape[1]
    first_kept = max(0, length - keep)
    kept: Tensor | None = None
    cache: Cache | None = None
    # The first chunk attends exactly, and so does decoding until the first group is sealed.
    for start, stop in itertools.pairwise([0, *range(window + group, length, group), length]):
        logits, cache = forward(model, rows[:, start:stop], cache, last_only=stop <= first_kept)
        if stop <= first_kept:
            continue
        if kept is None:
            kept = logits.new_empty(logits.shape[0], length - first_kept, logits.shape[2])
        begin = max(start, first_kept)
        kept[:, begin - first_kept : stop - first_kept] = logits[:, begin - start :]
    assert kept is not None  # there is at least one chunk, and the last one is kept
    return kept


def parallel_logits(surveyed: Survey, adapter: CSKVAdapter | None, rows: Tensor) -> Tensor:
    """The same in one forward without a cache, for short texts: a mask of tokens x 2 tokens is made.

    Args:
        surveyed: the model, attached or not, as it was found before anything was attached.
        adapter: on the model's device; None for the uncompressed model.
        rows: (batch, tokens) ids, padded on the right or not at all.

    Returns:
        (batch, tokens, vocabulary) logits.
    """
    rows = rows.to(device_of(surveyed.model))
    with nullcontext() if adapter is None else compressed_reading(surveyed, adapter):
        return surveyed.model(input_ids=rows, use_cache=False).logits


def context_cache(model: PreTrainedModel, rows: Tensor, mask: Tensor | None) -> Cache:
    """A cache that holds contexts, which attend exactly as they are prefilled.

    Args:
        model: attached or not.
        rows: (batch, tokens) ids, padded on the left or not at all.
        mask: (batch, tokens) with 0 at the padding; None for no padding.

    Raises:
        CacheError: the model returns no cache.
    """
    kwargs: dict[str, Any] = {"use_cache": True}
    parameters = inspect.signature(model.forward).parameters
    if mask is not None:
        kwargs["attention_mask"] = mask
        if "position_ids" in parameters:
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in parameters:
        kwargs["logits_to_keep"] = 1
    with torch.no_grad():
        cache = output_cache(model(input_ids=rows, **kwargs))
    if cache is None:
        raise CacheError(f"{type(model).__name__} returned no cache; expected a decoder that supports use_cache=True")
    return cache

"""The logits of whole texts as the compressed cache sees them, right-padded batches included.

Texts are fed in pieces (`cskv.evaluation.forward`). Rows that are padded on the right need no mask: they all begin at
position 0, no real token attends to a later one, and a group is read only by queries behind it, so that it holds no
padding when a real token reads it.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor
from transformers import PreTrainedModel

from cskv.adapter.adapter import CSKVAdapter
from cskv.evaluation.forward import pieces, read
from cskv.models.placement import device_of
from cskv.models.survey import Survey
from cskv.reading.compressed import compressed_reading


def chunked_logits(model: PreTrainedModel, rows: Tensor, first: int, chunk: int, keep: int) -> Tensor:
    """Feed texts through the model's own cache, compressed when it is attached.

    Memory is that of the cache, of the logits of one chunk, and of the result.

    Args:
        model: attached or not.
        rows: (batch, tokens) ids, padded on the right or not at all.
        first, chunk: tokens of the first chunk and of the others: `sinks + window + group` and `group` of the cache.
        keep: how many of the last positions are wanted; the language-model head is spared the others.

    Returns:
        (batch, keep, vocabulary) logits, or all positions' where there are fewer.
    """
    length = rows.shape[1]
    first_kept = max(0, length - keep)
    kept: Tensor | None = None
    # The first chunk attends exactly, and so does decoding until the first group is sealed.
    for (start, stop), logits in read(model, rows, pieces(length, first, chunk), skipped=first_kept):
        if stop <= first_kept:
            continue
        if kept is None:
            kept = logits.new_empty(logits.shape[0], length - first_kept, logits.shape[2])
        begin = max(start, first_kept)
        kept[:, begin - first_kept : stop - first_kept] = logits[:, begin - start :]
    assert kept is not None  # there is at least one chunk, and the last one is kept
    return kept


def parallel_logits(surveyed: Survey, adapter: CSKVAdapter | None, rows: Tensor) -> Tensor:
    """Return the same from one forward without a cache, for short texts: a mask of tokens x 2 tokens is made.

    Args:
        surveyed: the model, before anything was attached.
        adapter: on the model's device; None for the uncompressed model.
        rows: (batch, tokens) ids, padded on the right or not at all.

    Returns:
        (batch, tokens, vocabulary) logits.
    """
    rows = rows.to(device_of(surveyed.model))
    with nullcontext() if adapter is None else compressed_reading(surveyed, adapter):
        return surveyed.model(input_ids=rows, use_cache=False).logits

"""Perplexity of text as the compressed cache sees it (see `cskv.evaluation.forward`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from cskv.errors import DataError
from cskv.evaluation.forward import check_least, pieces, read
from cskv.models.evaluation_mode import evaluation_mode


@dataclass(frozen=True)
class Perplexity:
    """Attributes:
    ppl: exp(nll).
    nll: the mean negative log-likelihood, nats per token.
    tokens: how many tokens were predicted: all but the first of each sequence.
    """

    ppl: float
    nll: float
    tokens: int


def perplexity(
    model: PreTrainedModel,
    sequences: Int[Tensor, "sequences tokens"],
    *,
    chunk: int = 32,
    first_chunk: int | None = None,
    batch_size: int = 1,
    on_tokens: Callable[[int], None] | None = None,
    new_cache: Callable[[], Cache] | None = None,
) -> Perplexity:
    """Measure teacher-forced perplexity through the model's own cache, compressed when the model is attached.

    Args:
        model: attached or not; it is put in evaluation mode for the time of the call.
        sequences: token ids, each row a text of its own.
        chunk: tokens per forward after the first; `config.group` for equality with token-by-token decoding.
        first_chunk: tokens of the first forward (the prefill, which attends exactly); `chunk` when None. Use
            `config.sinks + config.window + config.group` for the equality above.
        batch_size: rows fed together.
        on_tokens: called with the number of tokens just fed (rows times tokens), for a progress bar.
        new_cache: makes the empty cache of each batch of rows; the model's own when None.

    Raises:
        DataError: fewer than two tokens per sequence, no sequence, a chunk or batch size below 1, or logits that are
            not finite.
    """
    first = chunk if first_chunk is None else first_chunk
    check_least(1, chunk=chunk, first_chunk=first, batch_size=batch_size)
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise DataError(f"token sequences have shape {tuple(sequences.shape)}; expected (at least 1, at least 2)")
    total, parts = 0.0, pieces(sequences.shape[1] - 1, first, chunk)  # the last token is only a target
    with evaluation_mode(model):
        for rows in sequences.split(batch_size):
            for (start, stop), logits in read(model, rows, parts, None if new_cache is None else new_cache()):
                targets = rows[:, start + 1 : stop + 1].to(logits.device)
                flat = logits.float().flatten(0, 1)
                total += torch.nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum").item()
                if on_tokens is not None:
                    on_tokens((stop - start) * rows.shape[0])
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    if not math.isfinite(total):
        raise DataError(f"the model's log-likelihood of the text is {total}: its logits are not finite")
    return Perplexity(ppl=math.exp(total / tokens), nll=total / tokens, tokens=tokens)


def token_sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, count: int
) -> Int[Tensor, "count length"]:
    """Return the first `length` tokens of the first `count` texts that are that long: one document per sequence.

    Raises:
        DataError: fewer than `count` texts are long enough.
    """
    rows: list[list[int]] = []
    for text in texts:
        # Tokenising all of a long text for its head is slow; 16 characters a token are ample.
        ids = tokenizer(text[: 16 * length], verbose=False)["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            return torch.tensor(rows, dtype=torch.long)
    raise DataError(
        f"only {len(rows)} texts have {length} tokens; expected {count}: give more text or shorter sequences"
    )

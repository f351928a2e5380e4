"""Perplexity of text as the compressed cache sees it.

A single forward over a text attends exactly and would hide the compression. Here a text is fed in chunks through the
cache, teacher-forced: a position reads the tokens sealed before its chunk from the latents, and the window and its own
chunk exactly. With a first chunk of `window + group` tokens and chunks of `group`, chunks begin where groups are sealed,
so that this equals token-by-token decoding and costs `group` times fewer forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
) -> Perplexity:
    """Teacher-forced perplexity through the model's own cache, compressed when the model is attached.

    Memory is bounded by the cache and by the logits of one chunk.

    Args:
        sequences: token ids, each row a text of its own.
        chunk: tokens per forward after the first; `config.group` for equality with token-by-token decoding.
        first_chunk: tokens of the first forward (the prefill, which attends exactly); `chunk` when None. Use
            `config.window + config.group` for the equality above.
        batch_size: rows fed together.
        on_tokens: called with the number of tokens just fed (rows times tokens), for a progress bar.

    Raises:
        DataError: fewer than two tokens per sequence, no sequence, or a chunk or batch size below 1.
    """
    raise NotImplementedError


def token_sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, count: int
) -> Int[Tensor, "count length"]:
    """The first `length` tokens of the first `count` texts that are that long: one document per sequence.

    Raises:
        DataError: fewer than `count` texts are long enough.
    """
    raise NotImplementedError

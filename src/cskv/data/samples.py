"""Token samples of one length, packed from a stream of documents.

Documents are tokenised as they come and laid end to end, with the end-of-text token after each; the row of tokens is
cut into samples. A tokenizer that begins every text with its begin token does so for every sample, since models rely
on it (attention sinks). Only one batch of documents and the remainder of the last one are held, so memory does not grow
with the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from cskv.data.sources import PIECE_CHARACTERS, TextSource
from cskv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 18


@dataclass(eq=False)
class TokenSamples:
    """`num_samples` samples of `sample_len` tokens from a text source.

    Iterating gives int64 tensors of shape (sample_len,), the same ones each time. `starting_at` skips.

    Args:
        source: where the text comes from.
        tokenizer: a transformers tokenizer.
        num_samples: how many, at least 1.
        sample_len: tokens in each, at least 2.
        seed: picks the order of the source's documents.

    Raises:
        DataError: a number is out of range. While iterating: there is no text, or less than asked for.
    """

    source: TextSource
    tokenizer: PreTrainedTokenizerBase
    num_samples: int
    sample_len: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.sample_len < 2:
            raise DataError(
                f"got {self.num_samples} samples of {self.sample_len} tokens; expected at least 1 sample of at least "
                "2 tokens"
            )

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Int[Tensor, " sample_len"]]:
        return self.starting_at(0)

    def starting_at(self, index: int) -> Iterator[Int[Tensor, " sample_len"]]:
        """Yield the samples from this index on. Those before it are tokenised and dropped."""
        begin = begin_tokens(self.tokenizer)
        body = self.sample_len - len(begin)
        row: list[int] = []
        made = tokens = 0
        for new in self._token_batches():
            tokens += len(new)
            row.extend(new)
            for start in range(0, len(row) - body + 1, body):
                if made >= index:
                    yield torch.tensor(begin + row[start : start + body])
                made += 1
                if made == self.num_samples:
                    return
            del row[: len(row) // body * body]
        self._refuse(made, tokens, body)

    def _refuse(self, made: int, tokens: int, body: int) -> None:
        name = self.source.name
        if tokens == 0:
            raise DataError(f"{name} holds no text; give a source with text")
        if made == 0:
            raise DataError(
                f"{name} has {tokens} tokens; one sample needs {body}: give more text or a smaller sample length"
            )
        raise DataError(
            f"{name} has {tokens} tokens, enough for {made} samples of {self.sample_len}; {self.num_samples} were "
            f"asked for ({self.num_samples * body} tokens): give more text or ask for at most {made}"
        )

    def _token_batches(self) -> Iterator[list[int]]:
        """Yield the tokens of some hundred thousand characters at a time: fast tokenizers work in parallel."""
        separator = (
            [self.tokenizer.eos_token_id] if self.source.separate and self.tokenizer.eos_token_id is not None else []
        )
        batch: list[tuple[str, list[int]]] = []
        characters = 0
        for text in self.source.read(self.seed):
            if self.source.separate and not text.strip():
                continue
            *pieces, last = _pieces(text)
            batch += [*((piece, []) for piece in pieces), (last, separator)]
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield self._tokenise(batch)
                batch, characters = [], 0
        if batch:
            yield self._tokenise(batch)

    def _tokenise(self, batch: list[tuple[str, list[int]]]) -> list[int]:
        encoded = self.tokenizer(
            [text for text, _ in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [token for ids, (_, tail) in zip(encoded, batch, strict=True) for token in (*ids, *tail)]


def _pieces(text: str) -> list[str]:
    """Cut a document at line ends into pieces that a tokenizer handles well."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        newline = text.rfind("\n", start, start + PIECE_CHARACTERS)
        stop = newline + 1 if newline >= start else start + PIECE_CHARACTERS
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin token if the tokenizer begins every text with it, else nothing."""
    begin = tokenizer.bos_token_id
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return [begin] if begin is not None and first == [begin] else []

"""Greedy answers to prompts, batched, in two protocols.

in-prefill       context and question are prefilled together, which attends exactly, through plain `model.generate`:
the first answer token is exact and every later one reads the cache. The paper's protocol.
context-first    the context is prefilled, and with it compressed, before the question is known; then the question
reads it from the cache. kvpress's protocol, and the harder one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from cskv.errors import DataError
from cskv.evaluation.forward import clock, forward
from cskv.methods.method import NewCache
from cskv.models.compat import cache_kwarg
from cskv.models.placement import device_of

IN_PREFILL, CONTEXT_FIRST = "in-prefill", "context-first"
PROTOCOLS = (IN_PREFILL, CONTEXT_FIRST)


@dataclass(frozen=True)
class Answers:
    """Answers of one batch, and their times.

    Attributes:
        texts: one per row, without special tokens.
        prompt_tokens: of all rows, without padding.
        prefill_seconds: until the first token was there.
        decode_tokens: tokens after the first, of all rows.
        decode_seconds: that they took.
    """

    texts: list[str]
    prompt_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    questions: Sequence[str],
    max_new_tokens: int,
    new_cache: NewCache | None = None,
    *,
    protocol: str = IN_PREFILL,
    endings: Sequence[Callable[[str], bool]] | None = None,
    multiple: int = 1,
) -> Answers:
    """Continue contexts, each with its question, greedily; what is prefilled is left-padded to one length.

    Args:
        model: attached or not.
        tokenizer: the model's; texts are encoded as they are, without a chat template.
        contexts, questions: one of each per row.
        max_new_tokens: the longest answer.
        new_cache: makes the empty cache; the model's own when None.
        protocol: "in-prefill" or "context-first"; the latter encodes questions on their own, without special tokens.
        endings: for each row, what tells whether the text so far is a whole answer; None where only the end-of-sequence
            token ends one.
        multiple: what is prefilled is padded to a multiple of so many tokens.

    Raises:
        DataError: with "context-first" the questions differ in their number of tokens (see `question_tokens`).
    """
    apart = protocol == CONTEXT_FIRST
    prefilled = contexts if apart else [context + question for context, question in zip(contexts, questions)]
    heads = [tokenizer(text, verbose=False)["input_ids"] for text in prefilled]
    tails = [question_tokens(tokenizer, question) if apart else [] for question in questions]
    if len(set(map(len, tails))) != 1:
        raise DataError(f"questions have {sorted(set(map(len, tails)))} tokens; expected batches of equal length")
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    input_ids, mask = left_pad(heads, pad, multiple)
    question_ids = torch.tensor(tails, dtype=torch.long)
    device, eos = device_of(model), end_ids(model)
    ends = _AnswerEnd(tokenizer, input_ids.shape[1] + question_ids.shape[1], eos, device, endings)
    began = clock(device)
    cache = None if new_cache is None else new_cache()
    if apart:
        made = _read_then_answer(model, input_ids, mask, question_ids, max_new_tokens, cache, ends)
    else:
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos or None
        )
        made = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            stopping_criteria=[ends],
            **({} if cache is None else {cache_kwarg(model): cache}),
        )
    return ends.answers(made, int(mask.sum()) + question_ids.numel(), began, clock(device))


def _read_then_answer(
    model: PreTrainedModel,
    context_ids: Int[Tensor, "batch context"],
    mask: Int[Tensor, "batch context"],
    question_ids: Int[Tensor, "batch question"],
    max_new_tokens: int,
    cache: Cache | None,
    ends: _AnswerEnd,
) -> Int[Tensor, "batch tokens"]:
    """Prefill contexts, then feed the questions and each new token; return all token ids."""
    padding = None if bool(mask.all()) else mask
    _, cache = forward(model, context_ids, cache, last_only=True, mask=padding)
    input_ids = torch.cat([context_ids, question_ids], dim=1)
    piece, seen = question_ids, context_ids.shape[1]
    for _ in range(max_new_tokens):
        if padding is not None:
            padding = torch.cat([padding, torch.ones_like(piece)], dim=1)
        logits, cache = forward(model, piece, cache, last_only=True, seen=seen, mask=padding)
        seen += piece.shape[1]
        piece = logits.argmax(-1).cpu()
        input_ids = torch.cat([input_ids, piece], dim=1)
        if bool(ends(input_ids, None).all()):
            break
    return input_ids


def question_tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Tokenise a question as it follows a context that is cached already."""
    return tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]


def left_pad(
    rows: Sequence[Sequence[int]], pad: int, multiple: int = 1
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Return token ids of one length, a multiple, padded on the left, and the mask that marks the real ones with 1."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, length - len(row) :] = 1
    return ids, mask


@dataclass
class _AnswerEnd(StoppingCriteria):
    """Ends a row at end-of-sequence or where its answer is whole.

    Attributes:
        first_token_at: seconds of `clock` when the first token was there.
        lengths: (batch,) generated tokens per row, the ending one included.
        done: (batch,) rows that have ended.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_length: int
    end_ids: Sequence[int]
    device: torch.device
    endings: Sequence[Callable[[str], bool]] | None
    first_token_at: float = 0.0
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    done: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"] | None, **kwargs: Any
    ) -> Bool[Tensor, " batch"]:
        """Tell which rows have ended; called after every token."""
        new = input_ids[:, self.prompt_length :].tolist()
        if not self.lengths.numel():
            self.first_token_at = clock(self.device)
            self.lengths = torch.zeros(len(new), dtype=torch.long)
            self.done = torch.zeros(len(new), dtype=torch.bool)
        self.lengths[~self.done] += 1
        for index, row in enumerate(new):
            if not self.done[index]:
                self.done[index] = row[-1] in self.end_ids or self._is_whole(index, row)
        return self.done.to(input_ids.device, copy=True)

    def answers(
        self, sequences: Int[Tensor, "batch tokens"], prompt_tokens: int, began: float, ended: float
    ) -> Answers:
        """Collect the generated texts, each row up to its end."""
        texts = [
            str(self.tokenizer.decode(row[self.prompt_length :][:length], skip_special_tokens=True))
            for row, length in zip(sequences, self.lengths.tolist(), strict=True)
        ]
        return Answers(
            texts=texts,
            prompt_tokens=prompt_tokens,
            prefill_seconds=self.first_token_at - began,
            decode_tokens=int((self.lengths - 1).sum()),
            decode_seconds=ended - self.first_token_at,
        )

    def _is_whole(self, index: int, row: list[int]) -> bool:
        return self.endings is not None and self.endings[index](str(self.tokenizer.decode(row)))


def end_ids(model: PreTrainedModel) -> list[int]:
    """Return the tokens at which the model's texts end."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)

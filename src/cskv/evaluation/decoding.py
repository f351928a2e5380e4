"""Greedy answers to prompts, batched, in two protocols.

in-prefill       context and question are prefilled together, which attends exactly, through plain `model.generate`:
the first answer token is exact and every later one reads the cache. The paper's protocol.
context-first    the context is prefilled, and with it compressed, before the question is known; then the question
reads it from the cache. kvpress's protocol, and the harder one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from cskv.errors import DataError
from cskv.evaluation.forward import clock, forward
from cskv.methods.method import NewCache
from cskv.models.compat import cache_kwarg

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
    prompts: Sequence[str],
    max_new_tokens: int,
    new_cache: NewCache | None = None,
    *,
    until_line: bool = True,
) -> Answers:
    """Continue prompts greedily with `model.generate`, left-padded to one length.

    Args:
        model: attached or not.
        tokenizer: the model's; prompts are encoded as they are, without a chat template.
        max_new_tokens: the longest answer.
        new_cache: makes the empty cache; the model's own when None.
        until_line: a row ends at a newline after a digit, too.
    """
    encoded = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    pad, eos = _pad_id(tokenizer), _end_ids(model)
    input_ids, mask = left_pad(encoded, pad)
    ends = AnswerEnd(tokenizer, input_ids.shape[1], eos, model.device, until_line=until_line)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos or None
    )
    began = clock(model.device)
    generated = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=[ends],
        **({} if new_cache is None else {cache_kwarg(model): new_cache()}),
    )
    ended = clock(model.device)
    return ends.answers(generated, sum(map(len, encoded)), began, ended)


def answer_after_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    questions: Sequence[str],
    max_new_tokens: int,
    new_cache: NewCache | None = None,
    *,
    until_line: bool = True,
) -> Answers:
    """Prefill contexts, then ask questions of equally many tokens about them, and continue greedily.

    Args:
        model: attached or not.
        tokenizer: the model's. Questions are encoded on their own, without special tokens.
        contexts, questions: one of each per row; contexts are left-padded to one length.
        max_new_tokens: the longest answer.
        new_cache: makes the empty cache; the model's own when None.
        until_line: a row ends at a newline after a digit, too.

    Raises:
        DataError: the questions differ in their number of tokens (see `question_tokens`).
    """
    heads = [tokenizer(context, verbose=False)["input_ids"] for context in contexts]
    tails = [question_tokens(tokenizer, question) for question in questions]
    if len(set(map(len, tails))) != 1:
        raise DataError(f"questions have {sorted(set(map(len, tails)))} tokens; expected batches of equal length")
    context_ids, mask = left_pad(heads, _pad_id(tokenizer))
    question_ids = torch.tensor(tails, dtype=torch.long)
    input_ids = torch.cat([context_ids, question_ids], dim=1)
    ends = AnswerEnd(tokenizer, input_ids.shape[1], _end_ids(model), model.device, until_line=until_line)
    padding = None if bool(mask.all()) else mask
    began = clock(model.device)
    _, cache = forward(model, context_ids, None if new_cache is None else new_cache(), last_only=True, mask=padding)
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
    return ends.answers(input_ids, sum(map(len, heads)) + question_ids.numel(), began, clock(model.device))


def question_tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Tokenise a question as it follows a context that is cached already."""
    return tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]


def left_pad(
    rows: Sequence[Sequence[int]], pad: int
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Return token ids of equal length, padded on the left, and the mask that marks the real ones with 1."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, length - len(row) :] = 1
    return ids, mask


class AnswerEnd(StoppingCriteria):
    """Ends a row at end-of-sequence or at a newline after a digit; keeps each row's length and the first token's time.

    Attributes:
        lengths: (batch,) generated tokens per row, the ending one included.
        first_token_at: seconds of `clock` when the first token was there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        end_ids: Sequence[int],
        device: torch.device,
        *,
        until_line: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.end_ids = frozenset(end_ids)
        self.device = device
        self.until_line = until_line
        self.first_token_at = 0.0
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.done = torch.zeros(0, dtype=torch.bool)

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"] | None, **kwargs: Any
    ) -> Bool[Tensor, " batch"]:
        """Called after every token."""
        new = input_ids[:, self.prompt_length :].tolist()
        if not self.lengths.numel():
            self.first_token_at = clock(self.device)
            self.lengths = torch.zeros(len(new), dtype=torch.long)
            self.done = torch.zeros(len(new), dtype=torch.bool)
        self.lengths[~self.done] += 1
        for index, row in enumerate(new):
            self.done[index] |= row[-1] in self.end_ids or (self.until_line and self._is_complete(row))
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

    def _is_complete(self, row: list[int]) -> bool:
        before, newline, _ = str(self.tokenizer.decode(row)).rpartition("\n")
        return bool(newline) and any(map(str.isdigit, before))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _end_ids(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)

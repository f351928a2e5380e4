"""LongEval "lines" accuracy through plain `model.generate`, as the paper measures it.

The question is inside the prefill, so the first answer token comes from exact attention and every later one is read
from the cache: compressed when the model is attached, exact when it is not. Decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from cskv.capture import frozen
from cskv.data.lines import LinesCase, score
from cskv.errors import DataError
from cskv.evaluation.forward import clock
from cskv.evaluation.wilson import wilson_interval
from cskv.models.compat import cache_kwarg


@dataclass(frozen=True)
class CaseOutput:
    """What the model answered to one case."""

    key: str
    expected: int
    output: str
    correct: bool


@dataclass(frozen=True)
class LinesResult:
    """Accuracy over a number of cases.

    Attributes:
        num_lines: lines per record.
        n: cases.
        accuracy: the share of correct answers.
        low, high: Wilson's 95 % interval of the accuracy.
        prompt_tokens: the mean length of a prompt in tokens.
        prefill_seconds: the mean time from the call of `generate` to the first token, per case.
        decode_tokens_per_second: tokens after the first, over all cases, per second of decoding.
        outputs: one per case, in order.
    """

    num_lines: int
    n: int
    accuracy: float
    low: float
    high: float
    prompt_tokens: float
    prefill_seconds: float
    decode_tokens_per_second: float
    outputs: tuple[CaseOutput, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**asdict(self), "outputs": [asdict(output) for output in self.outputs]}


def evaluate_lines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[LinesCase],
    *,
    batch_size: int = 1,
    max_new_tokens: int = 64,
    on_case: Callable[[int], None] | None = None,
    new_cache: Callable[[], Cache] | None = None,
) -> LinesResult:
    """Answer every case greedily and score the answers.

    Args:
        model: attached or not; it is put in evaluation mode for the time of the call.
        tokenizer: the model's; prompts are encoded as they are, without a chat template.
        cases: for instance `[make_case(200, seed) for seed in range(50)]`.
        batch_size: cases generated together, left-padded.
        max_new_tokens: the longest answer. A row stops at end-of-sequence, or at a newline after a digit.
        on_case: called with the number of cases just finished, for a progress bar.
        new_cache: makes the empty cache of each batch; the model's own when None.

    Raises:
        DataError: no cases, or a batch size or answer length below 1.
    """
    if not cases:
        raise DataError("no LongEval cases to answer; give at least one")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")
    batches: list[_Answers] = []
    with frozen(model):
        for start in range(0, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            batches.append(_answer(model, tokenizer, [case.prompt for case in batch], max_new_tokens, new_cache))
            if on_case is not None:
                on_case(len(batch))
    return _summarise(cases, batches)


@dataclass(frozen=True)
class _Answers:
    """What one batch gave: texts, token counts, and seconds."""

    texts: list[str]
    prompt_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    new_cache: Callable[[], Cache] | None,
) -> _Answers:
    encoded = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    input_ids, mask = left_pad(encoded, pad)
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = AnswerEnd(tokenizer, prompt_length=input_ids.shape[1], end_ids=_as_list(eos), device=model.device)
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos)
    began = clock(model.device)
    generated = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=[ends],
        **({} if new_cache is None else {cache_kwarg(model): new_cache()}),
    )
    ended = clock(model.device)
    texts = [
        str(tokenizer.decode(row[input_ids.shape[1] :][:length], skip_special_tokens=True))
        for row, length in zip(generated, ends.lengths.tolist(), strict=True)
    ]
    return _Answers(
        texts=texts,
        prompt_tokens=sum(map(len, encoded)),
        prefill_seconds=ends.first_token_at - began,
        decode_tokens=int((ends.lengths - 1).sum()),
        decode_seconds=ended - ends.first_token_at,
    )


def _summarise(cases: Sequence[LinesCase], batches: Sequence[_Answers]) -> LinesResult:
    texts = [text for batch in batches for text in batch.texts]
    outputs = tuple(
        CaseOutput(case.key, case.expected, text, score(text, case.expected))
        for case, text in zip(cases, texts, strict=True)
    )
    correct = sum(output.correct for output in outputs)
    low, high = wilson_interval(correct, len(outputs))
    tokens, seconds = (sum(getattr(b, name) for b in batches) for name in ("decode_tokens", "decode_seconds"))
    return LinesResult(
        num_lines=max(case.num_lines for case in cases),
        n=len(outputs),
        accuracy=correct / len(outputs),
        low=low,
        high=high,
        prompt_tokens=sum(batch.prompt_tokens for batch in batches) / len(outputs),
        prefill_seconds=sum(batch.prefill_seconds for batch in batches) / len(outputs),
        decode_tokens_per_second=tokens / seconds if tokens else 0.0,
        outputs=outputs,
    )


def left_pad(
    rows: Sequence[Sequence[int]], pad: int
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Token ids of equal length, padded on the left, and the mask that marks the real ones with 1."""
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
        self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, end_ids: Sequence[int], device: torch.device
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.end_ids = frozenset(end_ids)
        self.device = device
        self.first_token_at = 0.0
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.done = torch.zeros(0, dtype=torch.bool)

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"] | None, **kwargs: Any
    ) -> Bool[Tensor, " batch"]:
        """Called by `generate` after every token."""
        new = input_ids[:, self.prompt_length :].tolist()
        if not self.lengths.numel():
            self.first_token_at = clock(self.device)
            self.lengths = torch.zeros(len(new), dtype=torch.long)
            self.done = torch.zeros(len(new), dtype=torch.bool)
        self.lengths[~self.done] += 1
        for index, row in enumerate(new):
            self.done[index] |= row[-1] in self.end_ids or self._is_complete(row)
        return self.done.to(input_ids.device, copy=True)

    def _is_complete(self, row: list[int]) -> bool:
        before, newline, _ = str(self.tokenizer.decode(row)).rpartition("\n")
        return bool(newline) and any(map(str.isdigit, before))


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)

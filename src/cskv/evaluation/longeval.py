"""LongEval "lines" accuracy through plain `model.generate`, as the paper measures it.

The question is inside the prefill, so the first answer token comes from exact attention and every later one is read
from the cache: compressed when the model is attached, exact when it is not. Decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from cskv.capture import frozen
from cskv.data.lines import LinesCase, score
from cskv.errors import DataError
from cskv.evaluation.decoding import Answers, answer
from cskv.evaluation.wilson import wilson_interval


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
    batches: list[Answers] = []
    with frozen(model):
        for start in range(0, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            batches.append(answer(model, tokenizer, [case.prompt for case in batch], max_new_tokens, new_cache))
            if on_case is not None:
                on_case(len(batch))
    return _summarise(cases, batches)


def _summarise(cases: Sequence[LinesCase], batches: Sequence[Answers]) -> LinesResult:
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

"""LongEval "lines" accuracy through plain `model.generate`, as the paper measures it.

The question is inside the prefill, so the first answer token comes from exact attention and every later one is read
from the cache: compressed when the model is attached, exact when it is not. Decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from cskv.data.cases import Case
from cskv.data.lines import LinesCase
from cskv.errors import DataError
from cskv.evaluation.tasks import evaluate_cases


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
    found = evaluate_cases(
        model,
        tokenizer,
        [Case("lines", case.num_lines, case.prompt, "", (str(case.expected),), last_integer=True) for case in cases],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        on_case=on_case,
        new_cache=new_cache,
    )
    return LinesResult(
        num_lines=max(case.num_lines for case in cases),
        n=found.n,
        accuracy=found.score,
        low=found.low,
        high=found.high,
        prompt_tokens=found.prompt_tokens,
        prefill_seconds=found.prefill_seconds,
        decode_tokens_per_second=found.decode_tokens_per_second,
        outputs=tuple(
            CaseOutput(case.key, case.expected, output.output, output.score == 1.0)
            for case, output in zip(cases, found.outputs, strict=True)
        ),
    )

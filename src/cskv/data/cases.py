"""A question about a long context, the answers that count as right, and how an output is scored."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        task: what it belongs to: "lines", "passkey", "niah-single", ...
        size: how large it is meant to be: lines of a record, or tokens of the prompt.
        context, question: the prompt's two parts. The context is what a cache may be compressed on before the question
            is known.
        answers: what the output has to hold.
        depth: where in the context the answer lies, from 0 (its beginning) to 1; None where it lies in several places.
        last_integer: scored as LongEval does, by the last integer in the output; otherwise as RULER does, by the share
            of answers that occur in it. They have to stand alone here: 123 is not found in 123000, nor cat in category.
    """

    task: str
    size: int
    context: str
    question: str
    answers: tuple[str, ...]
    depth: float | None = None
    last_integer: bool = False

    @property
    def prompt(self) -> str:
        """Return context and question together."""
        return self.context + self.question

    def is_over(self, output: str) -> bool:
        """Tell whether what follows no longer counts: after a line with a digit, where a single number is asked for."""
        before, newline, _ = output.rpartition("\n")
        asked = len(self.answers) == 1 and self.answers[0].isdecimal()
        return asked and bool(newline) and any(map(str.isdigit, before))

    def score(self, output: str) -> float:
        """Score an output, from 0 to 1."""
        if self.last_integer:
            integers = re.findall(r"\d+", output)
            return float(bool(integers) and int(integers[-1]) == int(self.answers[0]))
        return sum(_occurs(answer, output) for answer in self.answers) / len(self.answers)


def _occurs(answer: str, output: str) -> bool:
    if answer.isdecimal():
        return re.search(rf"(?<!\d){answer}(?!\d)", output) is not None
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", output, re.IGNORECASE) is not None

"""Wordings of needle tasks: the sentences that hold them, and what is said before and after the haystack.

"ruler" is the wording of RULER (arXiv 2404.06654), "passkey" that of Landmark Attention (arXiv 2305.16300), and "lines"
that of LongEval, which models trained on such records answer best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cskv.data import lines


@dataclass(frozen=True)
class Wording:
    """The texts of a needle task, as format strings.

    Attributes:
        header: before the haystack.
        needle: one needle, with `key` and `value`, and the newline or space that ends it.
        one, several: the question for one value, and for several values or keys; with `keys`.
    """

    header: str
    needle: str
    one: str
    several: str

    def needle_text(self, key: str, value: str) -> str:
        """Return the sentence that holds a value."""
        return self.needle.format(key=key, value=value)

    def question_text(self, keys: Sequence[str], values: int) -> str:
        """Return the question for some keys, with so many values in all."""
        joined = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
        return (self.one if values == 1 else self.several).format(keys=joined)


RULER = Wording(
    header=(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    ),
    needle="One of the special magic numbers for {key} is: {value}.\n",
    one=(
        "\nWhat is the special magic number for {keys} mentioned in the provided text? The special magic number for "
        "{keys} mentioned in the provided text is"
    ),
    several=(
        "\nWhat are all the special magic numbers for {keys} mentioned in the provided text? The special magic numbers "
        "for {keys} mentioned in the provided text are"
    ),
)
PASSKEY = Wording(
    header=(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n"
    ),
    needle="The pass key is {value}. Remember it. {value} is the pass key.\n",
    one="\nWhat is the pass key? The pass key is",
    several="\nWhat are the pass keys? The pass keys are",
)
LINES = Wording(
    header=lines.HEADER,
    needle=lines.line_text("{key}", "{value}"),
    one=lines.QUESTION.replace("{key}", "{keys}"),
    several=lines.QUESTION.replace("{key}", "{keys}").replace(
        "is the <REGISTER_CONTENT>", "are all <REGISTER_CONTENT>"
    ),
)
WORDINGS = {"ruler": RULER, "lines": LINES}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"

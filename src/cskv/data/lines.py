"""LongEval "lines": a long record of `key: number` lines and one question about it.

The prompt text, the key vocabulary and the scoring follow the published LongEval test cases, so that generated cases
and the published files can be used side by side.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cskv.data.cases import Case
from cskv.errors import DataError

MAX_NUMBER = 50_000

HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
RECORD_END = "\nNow the record is over."
QUESTION = RECORD_END + " Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number. "


@dataclass(frozen=True)
class LinesCase:
    """One question: the full prompt, the number that answers it, the key it asks for, and the record's length."""

    prompt: str
    expected: int
    key: str
    num_lines: int

    def as_case(self) -> Case:
        """Return the same question, with the record and what is asked after it apart.

        Raises:
            DataError: the prompt does not say where the record ends.
        """
        end = self.prompt.rfind(RECORD_END)
        if end < 0:
            raise DataError(
                f"the prompt that asks for line {self.key} does not contain {RECORD_END.strip()!r}, which LongEval "
                "records end with; its question cannot be told from its context"
            )
        context, question = self.prompt[:end], self.prompt[end:]
        place = context.find(f"line {self.key}: ")
        depth = None if place < 0 else place / max(1, len(context))
        return Case("lines", self.num_lines, context, question, (str(self.expected),), depth, last_integer=True)


@lru_cache(maxsize=1)
def key_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the adjectives and the nouns that keys are made of, each in a fixed order."""
    return word_list("adjective"), word_list("noun")


def word_list(*categories: str) -> tuple[str, ...]:
    """Return the words of some categories ("adjective", "noun", "verb") of `wonderwords`, each once, sorted."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ImportError("these tasks need the word lists of `wonderwords`: pip install wonderwords") from error
    words = RandomWord()
    return tuple(sorted({word for name in categories for word in words.filter(include_categories=[name])}))


def make_key(rng: random.Random) -> str:
    """Draw a key: an adjective and a noun."""
    adjectives, nouns = key_words()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def line_text(key: str, number: int | str) -> str:
    """Return one line of a record, with its newline."""
    return f"line {key}: REGISTER_CONTENT is <{number}>\n"


def make_case(num_lines: int, seed: int) -> LinesCase:
    """Generate one test case with pairwise different keys; the same arguments always give the same case."""
    if num_lines < 1:
        raise ValueError(f"a record needs at least one line, got {num_lines}")
    rng = random.Random(f"lines-{num_lines}-{seed}")
    keys: dict[str, None] = {}
    while len(keys) < num_lines:
        keys[make_key(rng)] = None
    record = [(key, rng.randint(1, MAX_NUMBER)) for key in keys]
    key, expected = rng.choice(record)
    prompt = HEADER + "".join(line_text(*entry) for entry in record) + QUESTION.format(key=key)
    return LinesCase(prompt, expected, key, num_lines)


def read_official(path: str | Path) -> list[LinesCase]:
    """Read the cases of a published LongEval lines file (JSON lines), unchanged.

    Raises:
        DataError: the file cannot be read, holds no case, or a row is none.
    """
    cases = []
    try:
        for row in Path(path).read_text(encoding="utf-8").splitlines():
            if row.strip():
                case = json.loads(row)
                key, expected = case["random_idx"][0], int(case["expected_number"])
                cases.append(LinesCase(str(case["prompt"]), expected, key, int(case["num_lines"])))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"row {len(cases) + 1} of {path} is no LongEval case ({type(error).__name__}: {error}); expected JSON "
            "lines with prompt, expected_number, random_idx and num_lines"
        ) from error
    if not cases:
        raise DataError(f"{path} holds no LongEval case; expected JSON lines, one case each")
    return cases


def score(output: str, expected: int) -> bool:
    """Tell whether the last integer in a model's output is the expected number."""
    integers = re.findall(r"\d+", output)
    return bool(integers) and int(integers[-1]) == expected

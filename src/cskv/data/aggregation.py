"""RULER's tasks that ask for more than one place of a text (arXiv 2404.06654): everything is made here, offline.

    vt    variable tracking: X1 = 12345, X2 = X1, ... in noise; all variables that have the value
    cwe   common words extraction: the ten words of a numbered list that come more often than all others
    fwe   frequent words extraction: the three most frequent of coded words whose counts fall off by Zipf's law

Wording, sizes of chains, repeats of words and lengths of answers are RULER's; "vt" and "cwe" begin with one solved
example, as there. Answers are words, each of which has to stand alone in the output.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from cskv.data.cases import Case
from cskv.data.lines import word_list
from cskv.data.wording import NOISE
from cskv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VT, CWE, FWE = "vt", "cwe", "fwe"
HOPS = 4  # assignments after the first
EXAMPLE_NOISES = 10
COMMON = 10  # words to be found
SHORT_TOKENS = 4096  # shorter prompts repeat words less often
EXPONENT = 2  # of Zipf's law
WORD_LETTERS = 6
TOKENS_PER_CODED_WORD = 50  # of the prompt, for one more word in the coded vocabulary


@dataclass(frozen=True)
class Prompt:
    """A prompt in its two parts, and its answers."""

    context: str
    question: str
    answers: tuple[str, ...]

    def solved(self, answer: str) -> str:
        """Return the whole with an answer, as an example for what follows."""
        return f"{self.context}{self.question} {answer}\n\n"


@dataclass(frozen=True)
class Aggregation:
    """A task: what makes its prompts, and the longest answer in tokens.

    Attributes:
        build: (how many noises or words, tokens of the whole prompt, source of randomness) -> the prompt.
        least: noises or words without which there is nothing to ask.
        most: as many as there are.
        answer_tokens: as in RULER: more would let a model name everything.
    """

    build: Callable[[int, int, random.Random], Prompt]
    least: int
    most: Callable[[], int]
    answer_tokens: int


def make(task: str, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> Case:
    """Make one case whose prompt has at most `tokens` tokens, and as many as fit; the same arguments, the same case.

    Args:
        task: one of `AGGREGATION`.
        tokenizer: the model's.
        tokens: of the whole prompt, special tokens included.
        seed: of words, values and places.

    Raises:
        DataError: there is no such task, no room for the least prompt, or no words for one that long.
    """
    if task not in AGGREGATION:
        raise DataError(f"task is {task!r}; expected one of {', '.join(AGGREGATION)}")
    known = AGGREGATION[task]

    def build(count: int) -> Prompt:
        return known.build(count, tokens, random.Random(f"{task}-{tokens}-{seed}"))

    def length(count: int) -> int:
        prompt = build(count)
        return len(tokenizer(prompt.context + prompt.question, verbose=False)["input_ids"])

    if (least := length(known.least)) > tokens:
        raise DataError(f"the shortest prompt of {task} takes {least} tokens; expected room for it in {tokens}")
    fits, fails = known.least, min(2 * known.least, most := known.most())
    while length(fails) <= tokens:
        if fails == most:
            raise DataError(f"{task} has words for {length(most)} tokens at most; expected fewer than {tokens}")
        fits, fails = fails, min(2 * fails, most)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if length(middle) <= tokens else (fits, middle)
    prompt = build(fits)
    return Case(task, tokens, prompt.context, prompt.question, prompt.answers)


def _tracking(noises: int, tokens: int, rng: random.Random) -> Prompt:
    example = _chain(EXAMPLE_NOISES, 3, rng)
    asked = _chain(noises, 5, rng)
    return Prompt(example.solved(" ".join(example.answers)) + asked.context, asked.question, asked.answers)


def _chain(noises: int, letters: int, rng: random.Random) -> Prompt:
    """Hide one chain of assignments, in order, in lines of noise."""
    names = _distinct(HOPS + 1, lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)))
    value = str(rng.randrange(10_000, 99_999))
    lines = [NOISE] * noises
    places = sorted(rng.sample(range(noises), len(names)))
    for index, (place, name) in enumerate(zip(places, names, strict=True)):
        given = f"VAR {names[index - 1]}" if index else value
        lines.insert(place + index, f"VAR {name} = {given}\n")
    return Prompt(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n" + "".join(lines),
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value "
        f"{value}, they are:",
        tuple(names),
    )


def _common(uncommon: int, tokens: int, rng: random.Random) -> Prompt:
    short = tokens < SHORT_TOKENS
    example = _numbered(10, 3, 1, rng) if short else _numbered(30, 10, 3, rng)
    asked = _numbered(uncommon, *((6, 1) if short else (30, 3)), rng)
    solved = example.solved(" ".join(f"{index}. {word}" for index, word in enumerate(example.answers, 1)))
    return Prompt(solved + asked.context, asked.question, asked.answers)


def _numbered(uncommon: int, common_repeats: int, uncommon_repeats: int, rng: random.Random) -> Prompt:
    """List ten words so many times, among others that come less often, all shuffled and numbered."""
    words = rng.sample(_words(), COMMON + uncommon)
    common, others = words[:COMMON], words[COMMON:]
    listed = common * common_repeats + others * uncommon_repeats
    rng.shuffle(listed)
    return Prompt(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n" + " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1)) + "\n",
        f"Question: What are the {COMMON} most common words in the above list? Answer: The top {COMMON} words that "
        "appear most often in the list are:",
        tuple(common),
    )


def _frequent(drawn: int, tokens: int, rng: random.Random) -> Prompt:
    """Repeat coded words so that the k-th comes in proportion to k^-2; the first is a noise of dots."""
    words = _distinct(
        max(5, tokens // TOKENS_PER_CODED_WORD), lambda: "".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))
    )
    words[0] = "..."
    zeta = math.pi**2 / 6  # the sum of all k^-2
    text = [word for k, word in enumerate(words, 1) for _ in range(int(drawn * k**-EXPONENT / zeta))]
    rng.shuffle(text)
    return Prompt(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. " + " ".join(text) + "\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
        tuple(words[1:4]),
    )


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


@lru_cache(maxsize=1)
def _words() -> list[str]:
    """Return the words of lists, all of letters, so that none is a part of another with a hyphen."""
    return [word for word in word_list("adjective", "noun", "verb") if word.isalpha() and word.islower()]


# Where 60 coded words are drawn, those asked for come 9, 4 and 2 times and the next one once: with fewer, not all are
# told apart.
AGGREGATION = {
    VT: Aggregation(_tracking, EXAMPLE_NOISES, lambda: 10**9, 30),
    CWE: Aggregation(_common, COMMON, lambda: len(_words()) - COMMON, 120),
    FWE: Aggregation(_frequent, 60, lambda: 10**9, 50),
}

"""Needles in haystacks: numbers hidden in a long text, to be found again.

    passkey           one pass key in repeated noise
    niah-single       one number of one key in a text
    niah-multikey     numbers of four keys in a text, of which one is asked for
    niah-multivalue   four numbers of one key, all asked for
    niah-multiquery   numbers of four keys, all asked for

The kinds are RULER's (arXiv 2404.06654); everything is made here, offline. The haystack is any text, cut at line ends;
"needles" makes it of further needles of other keys, which is RULER's hardest haystack and LongEval's record.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cskv.data.cases import Case
from cskv.data.lines import make_key
from cskv.data.wording import NOISE, PASSKEY, WORDINGS, Wording
from cskv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEVERAL = 4  # keys, values or queries, as in RULER
DIGITS = (10_000, 99_999)
PASSKEY_TASK = "passkey"


@dataclass(frozen=True)
class Kind:
    """A kind of needle task: how many keys are hidden, how many values each has, and how many keys are asked for."""

    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def has_depth(self) -> bool:
        """Tell whether there is one needle to find, whose depth can be chosen."""
        return self.values * self.queries == 1


KINDS = {
    PASSKEY_TASK: Kind(),
    "niah-single": Kind(),
    "niah-multikey": Kind(keys=SEVERAL),
    "niah-multivalue": Kind(values=SEVERAL),
    "niah-multiquery": Kind(keys=SEVERAL, queries=SEVERAL),
}


class Haystack:
    """Lines of text with the number of tokens of each, from which stretches of any length are taken.

    Args:
        texts: documents, read until there are `tokens` tokens.
        tokenizer: the model's.
        tokens: the longest stretch that will be asked for.

    Raises:
        DataError: the texts are shorter than that.
    """

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        self.lines: list[str] = []
        self.counts: list[int] = []
        total = 0
        for text in texts:
            lines = [line if line.endswith("\n") else line + "\n" for line in text.splitlines() if line.strip()]
            if not lines:
                continue
            encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
            self.lines += lines
            self.counts += map(len, encoded)
            total += sum(map(len, encoded))
            if total >= tokens:
                return
        raise DataError(f"the haystack has {total} tokens; expected at least {tokens}: give more text or ask for less")

    def take(self, tokens: int, rng: random.Random) -> list[str]:
        """Take consecutive lines of at most `tokens` tokens, from a random line on, beginning anew at the end."""
        order = itertools.cycle(range(len(self.lines)))
        taken: list[str] = []
        for index in itertools.islice(order, rng.randrange(len(self.lines)), None):
            tokens -= self.counts[index]
            if tokens < 0:
                break
            taken.append(self.lines[index])
        return taken


class NeedleMaker:
    """Makes the cases of one kind.

    Args:
        task: one of `KINDS`.
        tokenizer: the model's; sizes are counted with it.
        haystack: where needles are hidden; None for noise, "needles" for needles of other keys.
        wording: one of `WORDINGS`; pass keys have their own.

    Raises:
        DataError: there is no such task or wording, or pass keys are to be hidden among needles.
    """

    def __init__(
        self,
        task: str,
        tokenizer: PreTrainedTokenizerBase,
        haystack: Haystack | str | None = None,
        wording: str = "ruler",
    ) -> None:
        if task not in KINDS:
            raise DataError(f"task is {task!r}; expected one of {', '.join(KINDS)}")
        if wording not in WORDINGS:
            raise DataError(f"wording is {wording!r}; expected one of {', '.join(WORDINGS)}")
        if isinstance(haystack, str) and (haystack != "needles" or task == PASSKEY_TASK):
            raise DataError(
                f"haystack is {haystack!r} for {task}; expected a text, noise, or needles (not for passkey)"
            )
        self.task, self.kind, self.tokenizer = task, KINDS[task], tokenizer
        self.wording: Wording = PASSKEY if task == PASSKEY_TASK else WORDINGS[wording]
        self.haystack = Haystack([NOISE], tokenizer, 1) if haystack is None else haystack

    def make(self, tokens: int, seed: int, depth: float | None = None) -> Case:
        """Make one case whose prompt has at most `tokens` tokens; the same arguments always give the same case.

        Args:
            tokens: of the whole prompt, special tokens included.
            seed: of keys, values, places and the haystack's stretch.
            depth: where the needle lies, from 0 to 1; drawn where it is None. Tasks with several answers take none.

        Raises:
            DataError: the needles alone are longer than that, or the depth is out of range or makes no sense.
        """
        if depth is not None and not (0.0 <= depth <= 1.0 and self.kind.has_depth):
            raise DataError(
                f"depth is {depth} for {self.task}; expected 0 to 1, and only where one needle is asked for"
            )
        rng = random.Random(f"{self.task}-{tokens}-{seed}")
        needles = self._needles(rng)
        queried = list(needles)[: self.kind.queries]
        answers = tuple(value for key in queried for value in needles[key])
        question = self.wording.question_text(queried, len(answers))
        sentences = [self.wording.needle_text(key, value) for key, values in needles.items() for value in values]
        fixed = self._count(self.wording.header + "".join(sentences) + question)
        if fixed > tokens:
            raise DataError(f"{self.task} takes {fixed} tokens without any haystack; expected room for it in {tokens}")
        hay = self._hay(tokens - fixed, rng, set(needles))
        places = [rng.randint(0, len(hay)) for _ in sentences]
        if self.kind.has_depth:
            places[0] = places[0] if depth is None else round(depth * len(hay))
        found = places[0] / max(1, len(hay)) if self.kind.has_depth else None
        context = self.wording.header + "".join(_inserted(hay, sentences, places))
        return Case(self.task, tokens, context, question, answers, found if depth is None else depth)

    def _needles(self, rng: random.Random) -> dict[str, list[str]]:
        """Draw values by key; the keys that are asked for come first."""
        keys: dict[str, list[str]] = {}
        while len(keys) < self.kind.keys:
            keys[make_key(rng)] = [str(number) for number in rng.sample(range(*DIGITS), self.kind.values)]
        return keys

    def _hay(self, tokens: int, rng: random.Random, taken: set[str]) -> list[str]:
        if isinstance(self.haystack, Haystack):
            return self.haystack.take(tokens, rng)
        made: list[str] = []
        while True:
            key = make_key(rng)
            if key in taken:
                continue
            sentence = self.wording.needle_text(key, str(rng.randint(*DIGITS)))
            tokens -= self._count(sentence)
            if tokens < 0:
                return made
            taken.add(key)
            made.append(sentence)

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])


def _inserted(hay: Sequence[str], sentences: Sequence[str], places: Sequence[int]) -> list[str]:
    """Return the haystack's lines with each sentence before the line of its place."""
    result, start = [], 0
    for place, sentence in sorted(zip(places, sentences), key=lambda pair: pair[0]):
        result += [*hay[start:place], sentence]
        start = place
    return [*result, *hay[start:]]

"""Questions and texts that every method is measured on, made once per task, size and seed."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cskv.data import aggregation, code
from cskv.data.cases import Case
from cskv.data.lines import make_case, read_official
from cskv.data.needles import PASSKEY_TASK, Haystack, NeedleMaker
from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source
from cskv.errors import DataError
from cskv.evaluation.code import passes, problems
from cskv.evaluation.perplexity import token_sequences
from cskv.evaluation.settings import LINES, EvaluationSettings
from cskv.evaluation.tasks import in_chat

SEED_STEP = 1000  # questions of one seed


class Material:
    """Questions and texts of an evaluation.

    Args:
        tokenizer: the model's.
        settings: what is measured.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.cases = functools.cache(self._cases)
        self.texts = functools.cache(self._texts)
        self._haystack = functools.cache(self._make_haystack)

    def _cases(self, task: str, size: int, seed: int) -> list[Case]:
        """Make the questions of a task; a DataError says that there is too little text, or that they do not fit."""
        if task == LINES:
            made = list(self._lines(size, seed))
        elif task in aggregation.AGGREGATION:
            made = [aggregation.make(task, self.tokenizer, size, number) for number in self._numbers(seed)]
        elif task == code.CODE:
            made = list(self._code(size, seed))
        else:
            made = list(self._needles(task, size, seed))
        return [in_chat(self.tokenizer, case) for case in made] if self.settings.chat else made

    def _lines(self, size: int, seed: int) -> Iterator[Case]:
        files = map(read_official, self.settings.lines_files)
        published = [case.as_case() for cases in files if cases[0].num_lines == size for case in cases]
        if published:
            return iter(published[: self.settings.cases])
        return (make_case(size, number).as_case() for number in self._numbers(seed))

    def _numbers(self, seed: int) -> range:
        """Return the seeds of single questions."""
        return range(SEED_STEP * seed, SEED_STEP * seed + self.settings.cases)

    def _needles(self, task: str, tokens: int, seed: int) -> Iterator[Case]:
        """Make as many questions as there are to be, dealt out over the depths."""
        haystack = None if task == PASSKEY_TASK else self._haystack(seed)
        maker = NeedleMaker(task, self.tokenizer, haystack, self.settings.wording)
        depths = self.settings.depths if maker.kind.has_depth else (None,)
        for index, number in enumerate(self._numbers(seed)):
            yield maker.make(tokens, number, depths[index % len(depths)])

    def _code(self, tokens: int, seed: int) -> Iterator[Case]:
        """Ask for functions that leave at least half of the prompt to their context."""

        def fits(function: code.Function) -> bool:
            return 2 * len(self.tokenizer(function.head, verbose=False)["input_ids"]) <= tokens

        for function in problems(self.settings.cases, seed, fits):
            yield code.make(function, self.tokenizer, passes, tokens, seed)

    def _make_haystack(self, seed: int) -> Haystack | str | None:
        name = self.settings.haystack
        if name in ("noise", "needles"):
            return None if name == "noise" else name
        return Haystack(open_source(name, "heldout").read(seed), self.tokenizer, 2 * max(self.settings.tokens))

    def _texts(self, size: int, seed: int) -> Int[Tensor, "texts tokens"]:
        """Take so many tokens from the beginning of each held-out document.

        A running text has no order that a seed could pick: it is cut up, and every seed takes the next stretch.
        """
        if size < 2:
            raise DataError(f"texts are to have {size} tokens; expected at least 2")
        source, count = open_source(self.settings.text, "heldout"), self.settings.texts
        if source.separate:
            return token_sequences(self.tokenizer, source.read(seed), size, count)
        samples = TokenSamples(source, self.tokenizer, (seed + 1) * count, size)
        try:
            return torch.stack(list(samples.starting_at(seed * count)))
        except DataError as error:
            raise DataError(
                f"{error}; seed {seed} takes the texts {seed * count} to {seed * count + count - 1}"
            ) from error

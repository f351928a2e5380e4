"""Settings of an evaluation: everything that decides its figures, besides the methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from cskv.data import code
from cskv.data.aggregation import AGGREGATION
from cskv.data.code import CODE
from cskv.data.needles import KINDS
from cskv.data.wording import WORDINGS
from cskv.errors import ConfigError
from cskv.evaluation.decoding import PROTOCOLS

LINES, PERPLEXITY, AGREEMENT, CONTINUATION = "lines", "perplexity", "agreement", "continuation"
DEPARTURE = "departure"
TEXT_TASKS = (PERPLEXITY, CONTINUATION, DEPARTURE)
TASKS = (LINES, *KINDS, *AGGREGATION, CODE, *TEXT_TASKS)
ANSWER_TOKENS = 64
TOKENS_PER_LINE = 20  # of LongEval's records
READ_PER_GENERATED = 10  # tokens that are read in the time that one is generated in, roughly


class Job(NamedTuple):
    """One measurement of a method: a row, or for "perplexity" two."""

    task: str
    size: int
    protocol: str | None
    seed: int


@dataclass(frozen=True)
class EvaluationSettings:
    """An evaluation.

    Attributes:
        tasks: "lines" (LongEval), those of `cskv.data.needles` and of `cskv.data.aggregation`, "code" (functions to be
            completed, which are then run: `cskv.data.code`), "perplexity" (and agreement) of texts read as from
            the cache from their beginning, "continuation": the same of the last tokens of texts whose beginning was
            prefilled at once, which methods that only compress prompts can do as well, "departure" of what is generated
            after texts (`cskv.evaluation.departure`).
        lines: sizes of LongEval records.
        lines_files: published LongEval files, in place of generated records of the same number of lines.
        tokens: sizes of all other prompts.
        depths: where needles lie, from 0 to 1.
        cases: questions per task, size and seed.
        protocols: see `cskv.evaluation.decoding`.
        seeds: each is measured on its own.
        wording: of needles, one of `cskv.data.wording.WORDINGS`.
        haystack: "noise", "needles", or a text source, held-out split.
        chat: let questions go through the tokenizer's chat template.
        text, texts, text_tokens: the source of texts, how many per seed, and how long.
        continued: tokens of "continuation" that are scored.
        generated: tokens that "departure" generates after each text.
        batch_size: questions or texts in one forward.
        max_new_tokens: the longest answer; when None that of each task (`longest_answer`).
    """

    tasks: tuple[str, ...] = (LINES, PERPLEXITY)
    lines: tuple[int, ...] = (200,)
    lines_files: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (1024,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    cases: int = 50
    protocols: tuple[str, ...] = PROTOCOLS
    seeds: tuple[int, ...] = (0,)
    wording: str = "ruler"
    haystack: str = "offline"
    chat: bool = False
    text: str = "offline"
    texts: int = 8
    text_tokens: tuple[int, ...] = (1024,)
    continued: int = 256
    generated: int = 512
    batch_size: int = 4
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("protocols", PROTOCOLS)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong:
                raise ConfigError(f"{name} has {', '.join(map(repr, wrong))}; expected some of {', '.join(known)}")
        if self.wording not in WORDINGS:
            raise ConfigError(f"wording is {self.wording!r}; expected one of {', '.join(WORDINGS)}")
        for name in ("tasks", "lines", "tokens", "depths", "protocols", "seeds", "text_tokens"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; expected at least one")
        counts = ("lines", "tokens", "cases", "texts", "text_tokens", "continued", "generated")
        for name in (*counts, "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            smallest = min(value) if isinstance(value, tuple) else value
            if smallest is not None and smallest < 1:
                raise ConfigError(f"{name} has {smallest}; expected at least 1")
        if not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise ConfigError(f"depths are {', '.join(map(str, self.depths))}; expected 0 to 1")
        if CODE in self.tasks and self.chat:
            raise ConfigError("code is completed as a text, not in a chat; leave either out")
        if CODE in self.tasks and not set(self.seeds) <= set(range(code.PARTS)):
            raise ConfigError(
                f"seeds are {', '.join(map(str, self.seeds))}, and code has functions for seeds 0 to {code.PARTS - 1} "
                "alone, which share none"
            )
        if self.lines_files and len(self.seeds) > 1:
            raise ConfigError(
                f"seeds are {', '.join(map(str, self.seeds))}, and published files ask the same of every seed, which "
                "would count their questions twice; give one seed"
            )
        if CONTINUATION in self.tasks and self.continued >= min(self.text_tokens):
            raise ConfigError(
                f"continuation scores the last {self.continued} tokens of texts of {min(self.text_tokens)}; expected "
                "longer texts, or fewer tokens"
            )

    def jobs(self) -> Iterator[Job]:
        """Yield everything that is measured of a method, seed by seed."""
        for seed in self.seeds:
            for task in self.tasks:
                is_text = task in TEXT_TASKS
                sizes = self.lines if task == LINES else self.text_tokens if is_text else self.tokens
                for size in sizes:
                    for protocol in (None,) if is_text else self.protocols:
                        yield Job(task, size, protocol, seed)

    def longest_answer(self, task: str) -> int:
        """Return how many tokens the answer to a question has at most."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        own = {CODE: code.ANSWER_TOKENS} | {name: known.answer_tokens for name, known in AGGREGATION.items()}
        return own.get(task, ANSWER_TOKENS)

    def tokens_of(self, job: Job) -> float:
        """Count the tokens that a job reads, roughly: what its time goes by."""
        if job.task in TEXT_TASKS:
            return self.texts * (job.size + (READ_PER_GENERATED * self.generated if job.task == DEPARTURE else 0))
        return self.cases * job.size * (TOKENS_PER_LINE if job.task == LINES else 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return dataclasses.asdict(self)

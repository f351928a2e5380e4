"""Settings of an evaluation: everything that decides its figures, besides the methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from cskv.data.needles import KINDS
from cskv.data.wording import WORDINGS
from cskv.errors import ConfigError
from cskv.evaluation.decoding import PROTOCOLS

LINES, PERPLEXITY, AGREEMENT, CONTINUATION = "lines", "perplexity", "agreement", "continuation"
TEXT_TASKS = (PERPLEXITY, CONTINUATION)
TASKS = (LINES, *KINDS, *TEXT_TASKS)
TOKENS_PER_LINE = 20  # of LongEval's records


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
        tasks: "lines" (LongEval), the needle tasks of `cskv.data.needles`, "perplexity" (and agreement) of texts read
            as from the cache from their beginning, "continuation": the same of the last tokens of texts whose beginning
            was prefilled at once, which methods that only compress prompts can do as well.
        lines: sizes of LongEval records.
        lines_files: published LongEval files, in place of generated records of the same number of lines.
        tokens: sizes of needle prompts.
        depths: where needles lie, from 0 to 1.
        cases: questions per task, size and seed.
        protocols: see `cskv.evaluation.decoding`.
        seeds: each is measured on its own.
        wording: of needles, one of `cskv.data.wording.WORDINGS`.
        haystack: "noise", "needles", or a text source, held-out split.
        chat: let questions go through the tokenizer's chat template.
        text, texts, text_tokens: the source of texts, how many per seed, and how long.
        continued: tokens of "continuation" that are scored.
        batch_size: questions or texts in one forward.
        max_new_tokens: the longest answer.
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
    batch_size: int = 4
    max_new_tokens: int = 64

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
        for name in ("lines", "tokens", "cases", "texts", "text_tokens", "continued", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            smallest = min(value) if isinstance(value, tuple) else value
            if smallest < 1:
                raise ConfigError(f"{name} has {smallest}; expected at least 1")
        if not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise ConfigError(f"depths are {', '.join(map(str, self.depths))}; expected 0 to 1")
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

    def tokens_of(self, job: Job) -> float:
        """Count the tokens that a job reads, roughly: what its time goes by."""
        if job.task in TEXT_TASKS:
            return self.texts * job.size
        return self.cases * job.size * (TOKENS_PER_LINE if job.task == LINES else 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return dataclasses.asdict(self)

"""The models that caches are compared on, the texts, and how much is measured of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, ROOT
from cskv.evaluation.decoding import CONTEXT_FIRST, PROTOCOLS
from cskv.evaluation.settings import CONTINUATION, DEPARTURE, LINES, PERPLEXITY, EvaluationSettings

MODELS = ROOT / "models"  # where scripts/fetch_model.py is told to put them
TEXTS, QUESTIONS, GENERATION = "texts", "questions", "generation"  # kinds of suites


@dataclass(frozen=True)
class Subject:
    """A model, and how much is measured of it.

    Attributes:
        name: of its folder and result files, and to `scripts/fetch_model.py`.
        title: on pages.
        tasks: by kind of suite, those that the uncompressed model can do.
        settings: what differs from `EvaluationSettings` in all suites.
        asked: what differs where questions are asked.
        training: samples of gradient training.
    """

    name: str
    title: str
    tasks: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    training: int = 128

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return MODEL if self.name == "tinymodel" else MODELS / self.name

    def evaluation(self, text: str, seeds: tuple[int, ...], kind: str) -> EvaluationSettings:
        """Return the settings of a suite.

        Args:
            text: to read, held-out.
            seeds: of questions and texts.
            kind: of the suite.
        """
        tasks = self.tasks.get(kind, (PERPLEXITY,))
        more = self.asked if kind == QUESTIONS else {}
        return EvaluationSettings(tasks=tasks, text=text, seeds=seeds, **{**self.settings, **more})


@dataclass(frozen=True)
class Texts:
    """Names of texts (`cskv.data.sources`), or text files.

    Attributes:
        calibration, heldout: to make adapters from, and to measure them on.
        other: of another kind; both its training and its held-out part are used.
    """

    calibration: str = "wikitext2"
    heldout: str = "wikitext2"
    other: str = "offline"

    def describe(self) -> dict[str, str]:
        """Name them without their folders, and files by their contents as well."""
        return {name: _described(text) for name, text in vars(self).items()}


def _described(text: str) -> str:
    path = Path(text)
    return f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if path.is_file() else text


SIZES: dict[str, Any] = {
    "texts": 4,
    "text_tokens": (1024,),
    "continued": 256,
    "tokens": (1024,),
    "cases": 25,
    "batch_size": 8,
    "protocols": (CONTEXT_FIRST,),
}
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "qwen2.5-coder-1.5b",
            "Qwen2.5-Coder-1.5B",
            {QUESTIONS: (PERPLEXITY, CONTINUATION, LINES), GENERATION: ("code",)},
            SIZES | {"lines": (60,)},
            asked={"chat": True, "protocols": PROTOCOLS, "cases": 20, "max_new_tokens": 32},
        ),
        Subject(
            "smollm2",
            "SmolLM2-135M",
            {QUESTIONS: (PERPLEXITY, CONTINUATION, "niah-single", "fwe"), GENERATION: (DEPARTURE,)},
            SIZES | {"batch_size": 25},
            asked={"chat": True},
        ),
        Subject(
            "tinymodel",
            "the bundled model",
            {QUESTIONS: (PERPLEXITY, CONTINUATION, LINES, "niah-single"), GENERATION: (DEPARTURE,)},
            SIZES | {"tokens": (1000,), "lines": (200,), "wording": "lines", "max_new_tokens": 16},
        ),
    )
}

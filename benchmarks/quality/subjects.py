"""The models that caches are compared on, the texts, and how much is measured of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, ROOT
from cskv.evaluation.settings import EvaluationSettings

MODELS = ROOT / "models"  # where scripts/fetch_model.py is told to put them
TEXT_ONLY = ("perplexity",)


@dataclass(frozen=True)
class Subject:
    """A model, and how much is measured of it.

    Attributes:
        name: of its folder and result files, and to `scripts/fetch_model.py`.
        title: on pages.
        tasks: of the suites that ask questions; those that the uncompressed model can answer.
        settings: what differs from `EvaluationSettings` in all suites.
        training: samples of gradient training.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    training: int = 256

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return MODEL if self.name == "tinymodel" else MODELS / self.name

    def evaluation(self, text: str, seeds: tuple[int, ...], *, questions: bool) -> EvaluationSettings:
        """Return the settings of a suite.

        Args:
            text: to read, held-out.
            seeds: of questions and texts.
            questions: all tasks, not only texts.
        """
        tasks = self.tasks if questions else TEXT_ONLY
        return EvaluationSettings(tasks=tasks, text=text, seeds=seeds, **self.settings)


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


TEXT_SIZES: dict[str, Any] = {"texts": 8, "text_tokens": (512,), "continued": 256}
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "smollm2",
            "SmolLM2-135M",
            ("perplexity", "continuation", "departure", "niah-single", "vt", "cwe", "fwe"),
            TEXT_SIZES | {"tokens": (1024,), "chat": True},
        ),
        Subject(
            "qwen2.5-coder-1.5b",
            "Qwen2.5-Coder-1.5B",
            ("perplexity", "continuation", "departure", "lines", "niah-single", "niah-multikey", "vt", "code"),
            TEXT_SIZES | {"texts": 4, "tokens": (1024,), "lines": (60,), "cases": 25, "chat": True},
            training=64,
        ),
        Subject(
            "tinymodel",
            "the bundled model",
            ("perplexity", "continuation", "lines", "niah-single"),
            TEXT_SIZES | {"tokens": (1000,), "lines": (200,), "wording": "lines", "max_new_tokens": 16},
        ),
    )
}

"""Result files and results to figures. matplotlib is imported inside, and draws off screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cskv.evaluation.spectra import Spectrum


def plot_spectra(spectra: Iterable[Spectrum], path: str | Path, title: str | None = None) -> Path:
    """Draw normalised singular values per layer, K and V side by side, a row for weights and one for calibrated."""
    raise NotImplementedError


def plot_training(log: str | Path | Sequence[str | Path], path: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Draw the loss over steps from one or several JSON-lines training logs."""
    raise NotImplementedError


def plot_demo(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw accuracy and perplexity over cache bytes per token, one point per row of the demo's table."""
    raise NotImplementedError

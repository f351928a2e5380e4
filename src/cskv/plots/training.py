"""Training logs as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from cskv.errors import DataError
from cskv.plots.style import COLOURS, new_figure, readable_scale, save, styled


@styled
def plot_training(
    log: str | Path | Sequence[str | Path], path: str | Path, labels: Sequence[str] | None = None
) -> Path:
    """Draw the loss over steps from one or several JSON-lines training logs (one object with step and loss a line).

    Args:
        log: the log files.
        path: the PNG (or PDF, SVG) to write.
        labels: one name per log; the files' stems when None.

    Raises:
        DataError: a log is missing, is not JSON lines, or holds no loss.
        CSKVError: the file cannot be written.
    """
    logs = [Path(log)] if isinstance(log, (str, Path)) else [Path(entry) for entry in log]
    labels = [entry.stem for entry in logs] if labels is None else labels
    figure = new_figure(7.5, 4.5)
    ax = figure.subplots()
    smallest, largest = math.inf, 0.0
    for index, (entry, label) in enumerate(zip(logs, labels, strict=True)):
        steps, losses = _read_losses(entry)
        colour = COLOURS[(index + 1) % len(COLOURS)]
        ax.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(steps, smoothed(losses), color=colour, linewidth=2.0, label=label)
        smallest, largest = min(smallest, *losses), max(largest, *losses)
    ax.set(xlabel="step", ylabel="reconstruction loss, summed over layers")
    readable_scale(ax, smallest, largest)
    ax.set_title("Layer-wise reconstruction (bold: moving mean)")
    ax.legend(frameon=False)
    return save(figure, path)


def _read_losses(path: Path) -> tuple[list[int], list[float]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        points = [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read the training log {path}: {error}; expected JSON lines with step and loss"
        ) from error
    if not points:
        raise DataError(f"the training log {path} holds no loss; expected JSON lines with step and loss")
    return [step for step, _ in points], [loss for _, loss in points]


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a twentieth of the values around each; fewer at both ends."""
    half = len(values) // 40
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]

"""Reconstruction losses as figures: over layers, and over the steps of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cskv.errors import DataError
from cskv.plots.style import COLOURS, MARKERS, PROJECTIONS, new_figure, readable_scale, save, styled


@styled
def plot_losses(
    losses: Mapping[str, Sequence[tuple[int, float, float]]], path: str | Path, title: str | None = None
) -> Path:
    """Draw the reconstruction loss of each method over layers, keys beside values.

    Args:
        losses: method -> (layer index, loss of keys, loss of values) of each layer.
        path: the PNG (or PDF, SVG) to write.
        title: above both panels.

    Raises:
        DataError: no method.
        CSKVError: the file cannot be written.
    """
    if not losses:
        raise DataError("no losses to draw; give those of at least one method")
    layers = sorted({row[0] for rows in losses.values() for row in rows})
    figure = new_figure(10.0, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    for index, (method, rows) in enumerate(losses.items()):
        style = {"color": COLOURS[(index + 1) % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        style["linestyle"] = "-" if index < len(COLOURS) - 1 else "--"  # colours come again; black is not begun with
        for column, ax in enumerate(axes, start=1):
            ax.plot([row[0] for row in rows], [row[column] for row in rows], label=method, **style)
    for ax, name in zip(axes, PROJECTIONS.values(), strict=True):
        ax.set(title=name, xlabel="layer", yscale="log", xticks=layers)
    axes[0].set_ylabel("mean squared error per channel")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(losses)), frameon=False)
    figure.suptitle(title or "Reconstruction loss per layer")
    return save(figure, path)


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
    drawn: list[float] = []
    for index, (entry, label) in enumerate(zip(logs, labels, strict=True)):
        steps, losses = _read_losses(entry)
        colour = COLOURS[(index + 1) % len(COLOURS)]
        ax.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(steps, smoothed(losses), color=colour, linewidth=2.0, label=label)
        drawn += losses
    ax.set(xlabel="step", ylabel="reconstruction loss, summed over layers")
    readable_scale(ax, drawn)
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
    """Return the mean over a twentieth of the values around each; fewer at both ends."""
    half = len(values) // 40
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]

"""Reconstruction losses per layer as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cskv.errors import DataError
from cskv.plots.style import COLOURS, MARKERS, PROJECTIONS, new_figure, save, styled


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
    figure = new_figure(10.0, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    for index, (method, rows) in enumerate(losses.items()):
        style = {"color": COLOURS[(index + 1) % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        style["linestyle"] = "-" if index < len(COLOURS) - 1 else "--"  # colours come again; black is not begun with
        for column, ax in enumerate(axes, start=1):
            ax.plot([row[0] for row in rows], [row[column] for row in rows], label=method, **style)
    for ax, name in zip(axes, PROJECTIONS.values(), strict=True):
        ax.set(
            title=name,
            xlabel="layer",
            yscale="log",
            xticks=sorted({row[0] for rows in losses.values() for row in rows}),
        )
    axes[0].set_ylabel("mean squared error per channel")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(losses)), frameon=False)
    figure.suptitle(title or "Reconstruction loss per layer")
    return save(figure, path)

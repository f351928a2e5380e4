"""Ranks per layer as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cskv.errors import DataError
from cskv.plots.style import new_figure, save, styled


@styled
def plot_ranks(ranks: Mapping[int, tuple[int, int]], path: str | Path, title: str | None = None) -> Path:
    """Draw the latents kept of each layer's keys and values as a heat map.

    Args:
        ranks: layer index -> (key rank, value rank).
        path: the PNG (or PDF, SVG) to write.
        title: above the map.

    Raises:
        DataError: no layers.
        CSKVError: the file cannot be written.
    """
    if not ranks:
        raise DataError("no ranks to draw; give those of at least one layer")
    layers = sorted(ranks)
    table = [[ranks[layer][row] for layer in layers] for row in range(2)]
    most = max(map(max, table))
    figure = new_figure(max(5.6, 2.2 + 0.55 * len(layers)), 2.6)
    ax = figure.subplots()
    ax.grid(False)
    image = ax.imshow(table, cmap="cividis", aspect="auto", vmin=0, vmax=most)
    for y, row in enumerate(table):
        for x, rank in enumerate(row):
            ax.text(x, y, str(rank), ha="center", va="center", color="white" if rank < 0.55 * most else "black")
    ax.set(xlabel="layer", xticks=range(len(layers)), xticklabels=layers, yticks=(0, 1), yticklabels=("keys", "values"))
    figure.suptitle(title or "Latents kept per layer")  # of the figure: few layers make a narrow map
    figure.colorbar(image, ax=ax, label="latents")
    return save(figure, path)

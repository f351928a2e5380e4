"""Heat maps: needles found by depth and length of the text, and ranks by layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskv.errors import DataError
from cskv.evaluation.pooling import Pooled
from cskv.plots.series import shown
from cskv.plots.style import new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LETTER = 0.058  # inches, of the small print in cells and titles


@styled
def plot_needles(points: Iterable[Pooled], path: str | Path, title: str | None = None) -> Path:
    """Draw one small map per method and budget, compressed ones first; a dash where nothing was measured.

    Args:
        points: of one needle task and protocol, all sizes; those without cells are left out.
        path: the PNG (or PDF, SVG) to write.
        title: above the maps.

    Raises:
        DataError: no point has cells, or they are of several tasks or protocols.
        CSKVError: the file cannot be written.
    """
    found = [point for point in points if point.cells]
    if not found:
        raise DataError("no needles to draw; give at least one row that has cells")
    kinds = sorted({(point.task, point.protocol or "") for point in found})
    if len(kinds) > 1:
        raise DataError(f"needles are of {kinds}; a figure shows one task under one protocol: draw several")
    maps = _maps(found)
    sizes = sorted({point.size for point in found})
    depths = sorted({cell.depth for point in found for cell in point.cells})
    slots, columns = _slots(list(maps))
    least = 0.8 if len(maps) > columns else 1.4  # a single row has room
    wide = max(1.75 if columns > 1 else 3.2, 0.35 * len(sizes))  # of a map, in inches
    high = max(least, 0.19 * len(depths))
    headings = [_heading(method, budget, wide) for method, budget in maps]
    figure, axes = _grid(slots, columns, wide, high, max(heading.count("\n") for heading in headings) + 1)
    for ax, heading, own in zip(axes, headings, maps.values(), strict=True):
        scores = {(cell.depth, point.size): 100 * cell.score for point in own for cell in point.cells}
        table = [[scores.get((depth, size), math.nan) for size in sizes] for depth in depths]
        image = _draw_cells(ax, table, 100, fontsize=7)
        ax.tick_params(length=2, labelsize=7.5)
        ax.set_title(heading, fontsize=8, pad=3)
    _label_outside(dict(zip(slots, axes, strict=True)), columns, sizes, depths)
    width, height = figure.get_size_inches()
    figure.text(0.5, 0.1 / height, "tokens of the text", ha="center", fontsize=10)
    figure.text(0.08 / width, 0.5, "needle's depth, % of the text", va="center", rotation="vertical", fontsize=10)
    title = shown(title or f"Needles found: {kinds[0][0]}", int(width / 0.095))
    figure.suptitle(title, y=1 - 0.12 / height, va="top", fontsize=12)
    bar = min(height - 1.35, 4.0)
    place = (1 - 0.9 / width, 1 - (0.8 + bar) / height, 0.14 / width, bar / height)
    figure.colorbar(image, cax=figure.add_axes(place), label="found, %")
    return save(figure, path)


@styled
def plot_ranks(ranks: Mapping[int, tuple[int, int]], path: str | Path, title: str | None = None) -> Path:
    """Draw the latents kept of each layer's keys and values as one map.

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
    figure = new_figure(max(5.6, 2.2 + 0.55 * len(layers)), 2.6)
    ax = figure.subplots()
    image = _draw_cells(ax, table, max(map(max, table)))
    ax.set(xlabel="layer", xticks=range(len(layers)), xticklabels=layers, yticks=(0, 1), yticklabels=("keys", "values"))
    figure.suptitle(title or "Latents kept per layer")  # of the figure: few layers make a narrow map
    figure.colorbar(image, ax=ax, label="latents")
    return save(figure, path)


def _draw_cells(ax: Axes, table: Sequence[Sequence[float]], most: float, **font: Any) -> AxesImage:
    """Draw numbers from 0 to `most` on colours, and a dash for what is not a number."""
    ax.grid(False)
    image = ax.imshow(table, cmap="cividis", aspect="auto", vmin=0, vmax=most)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            missing = math.isnan(value)
            colour = "#777777" if missing else "white" if value < 0.55 * most else "black"
            ax.text(x, y, "–" if missing else f"{value:.0f}", ha="center", va="center", color=colour, **font)
    return image


def _grid(slots: Sequence[int], columns: int, wide: float, high: float, lines: int) -> tuple[Figure, list[Axes]]:
    """Place maps of one size in rows, by hand: a layout engine takes seconds over a hundred of them."""
    rows = max(slots) // columns + 1
    unfinished = len(slots) < rows * columns
    across, down = 0.14, 0.12 + 0.135 * lines + 0.16 * unfinished  # ticks above what is empty
    left, right, top, bottom = 0.75, 1.15, 0.5 + 0.135 * lines, 0.55
    width = left + columns * wide + (columns - 1) * across + right
    height = top + rows * high + (rows - 1) * down + bottom
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = []
    for slot in slots:
        row, column = divmod(slot, columns)
        x, y = left + column * (wide + across), height - top - (row + 1) * high - row * down
        axes.append(figure.add_axes((x / width, y / height, wide / width, high / height)))
    return figure, axes


def _maps(points: Sequence[Pooled]) -> dict[tuple[str, float | None], list[Pooled]]:
    """Group the points of each map: methods as they come, large budgets first, uncompressed ones last."""
    order = list(dict.fromkeys(point.method for point in points))
    ordered = sorted(points, key=lambda p: (p.budget is None, order.index(p.method), -(p.budget or 0.0)))
    return {key: list(own) for key, own in groupby(ordered, key=lambda point: (point.method, point.budget))}


def _slots(maps: Sequence[tuple[str, float | None]]) -> tuple[list[int], int]:
    """Return the place of each map, counted along rows, and the maps of a row.

    A method is a row where most have as many budgets as fit in one; else a few maps are one row, and many a block.
    """
    methods = [method for method, _ in maps]
    most = max((methods.count(method) for method, budget in maps if budget is not None), default=1)
    if len(maps) <= 4:
        return list(range(len(maps))), len(maps)
    if not 3 <= most <= 7:
        return list(range(len(maps))), min(5, math.ceil(math.sqrt(len(maps))))
    slots: list[int] = []
    for row, method in enumerate(dict.fromkeys(methods)):
        slots += range(row * most, row * most + methods.count(method))
    return slots, most


def _label_outside(axes: Mapping[int, Axes], columns: int, sizes: Sequence[int], depths: Sequence[float]) -> None:
    """Put ticks on the first map of each row and on those that have none below them; `axes` are by place."""
    for slot, ax in axes.items():
        lowest, first = slot + columns not in axes, slot % columns == 0
        ax.set_xticks(range(len(sizes)), [_tokens(size) if lowest else "" for size in sizes])
        ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" if first else "" for depth in depths])


def _tokens(size: int) -> str:
    if size >= 1024 and size % 512 == 0:
        return f"{size / 1024:g}k"
    return f"{size / 1000:g}k" if size >= 1000 else str(size)


def _heading(method: str, budget: float | None, width: float) -> str:
    name = textwrap.fill(shown(method, 2 * int(width / LETTER)), max(12, int(width / LETTER)))
    return name if budget is None else f"{name}\n{100 * budget:g} % of the cache"

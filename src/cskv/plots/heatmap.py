"""Needle tasks as heat maps: depth of the needle over length of the text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cskv.errors import DataError
from cskv.evaluation.pooling import Pooled
from cskv.plots.series import shown
from cskv.plots.style import new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    columns = min(_columns(maps), len(maps))
    least = 0.8 if len(maps) > columns else 1.4  # a single row has room
    wide, high = (
        max(1.75 if columns > 1 else 3.2, 0.35 * len(sizes)),
        max(least, 0.19 * len(depths)),
    )  # of a map, in inches
    headings = [_heading(method, budget, wide) for method, budget in maps]
    figure, axes = _grid(len(maps), columns, wide, high, max(heading.count("\n") for heading in headings) + 1)
    for ax, heading, own in zip(axes, headings, maps.values(), strict=True):
        _draw_map(ax, own, sizes, depths)
        ax.set_title(heading, fontsize=8, pad=3)
    _label_outside(axes, columns, sizes, depths)
    width, height = figure.get_size_inches()
    figure.text(0.5, 0.1 / height, "tokens of the text", ha="center", fontsize=10)
    figure.text(0.08 / width, 0.5, "needle's depth, % of the text", va="center", rotation="vertical", fontsize=10)
    title = shown(title or f"Needles found: {kinds[0][0]}", int(width / 0.095))
    figure.suptitle(title, y=1 - 0.12 / height, va="top", fontsize=12)
    bar = min(height - 1.35, 4.0)
    place = (1 - 0.9 / width, 1 - (0.8 + bar) / height, 0.14 / width, bar / height)
    figure.colorbar(axes[0].images[0], cax=figure.add_axes(place), label="found, %")
    return save(figure, path)


def _grid(count: int, columns: int, wide: float, high: float, lines: int) -> tuple[Figure, list[Axes]]:
    """Maps of one size in rows, placed by hand: a layout engine takes seconds over a hundred of them."""
    rows = -(-count // columns)
    across, down = 0.14, 0.12 + 0.135 * lines + 0.16 * (count % columns > 0)  # an unfinished row leaves ticks above it
    left, right, top, bottom = 0.75, 1.15, 0.5 + 0.135 * lines, 0.55
    width = left + columns * wide + (columns - 1) * across + right
    height = top + rows * high + (rows - 1) * down + bottom
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = []
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * (wide + across), height - top - (row + 1) * high - row * down
        axes.append(figure.add_axes((x / width, y / height, wide / width, high / height)))
    return figure, axes


def _maps(points: Sequence[Pooled]) -> dict[tuple[str, float | None], list[Pooled]]:
    """The points of each map: methods as they come, large budgets first, uncompressed ones last."""
    order = list(dict.fromkeys(point.method for point in points))

    def place(point: Pooled) -> tuple[bool, int, float]:
        return point.budget is None, order.index(point.method), -(point.budget or 0.0)

    ordered = sorted(points, key=place)
    return {key: list(own) for key, own in groupby(ordered, key=lambda point: (point.method, point.budget))}


def _columns(maps: Collection[tuple[str, float | None]]) -> int:
    """As many as most methods have budgets, so that a method is a row; else a row of few maps, a block of many."""
    methods = [method for method, budget in maps if budget is not None]
    budgets = max((methods.count(method) for method in methods), default=1)
    if len(maps) <= 4:
        return len(maps)
    return budgets if 3 <= budgets <= 7 else min(5, math.ceil(math.sqrt(len(maps))))


def _draw_map(ax: Axes, points: Sequence[Pooled], sizes: Sequence[int], depths: Sequence[float]) -> None:
    scores = {(cell.depth, point.size): 100 * cell.score for point in points for cell in point.cells}
    table = [[scores.get((depth, size), math.nan) for size in sizes] for depth in depths]
    ax.grid(False)
    ax.imshow(table, cmap="cividis", aspect="auto", vmin=0, vmax=100)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            missing = math.isnan(value)
            colour = "#777777" if missing else "white" if value < 55 else "black"
            ax.text(x, y, "–" if missing else f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    ax.tick_params(length=2, labelsize=7.5)


def _label_outside(axes: Sequence[Axes], columns: int, sizes: Sequence[int], depths: Sequence[float]) -> None:
    """Ticks on the first map of each row and on the last of each column, which an unfinished row leaves higher up."""
    names = [f"{100 * depth:.0f}" for depth in depths]
    for index, ax in enumerate(axes):
        ax.set_xticks(
            range(len(sizes)), [_tokens(size) for size in sizes] if index + columns >= len(axes) else [""] * len(sizes)
        )
        ax.set_yticks(range(len(depths)), names if index % columns == 0 else [""] * len(depths))


def _tokens(size: int) -> str:
    if size >= 1024 and size % 512 == 0:
        return f"{size / 1024:g}k"
    return f"{size / 1000:g}k" if size >= 1000 else str(size)


def _heading(method: str, budget: float | None, width: float) -> str:
    name = textwrap.fill(shown(method, 2 * int(width / LETTER)), max(12, int(width / LETTER)))
    return name if budget is None else f"{name}\n{100 * budget:g} % of the cache"

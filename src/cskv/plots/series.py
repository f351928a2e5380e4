"""Methods as series of figures: how each is told apart, the legend, and agreement along the text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskv.errors import DataError
from cskv.evaluation.pooling import Pooled
from cskv.plots.style import COLOURS, new_figure, plain, readable_scale, save, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HUES = COLOURS[1:]  # black is for what is not compressed
LINES = ("-", "--", ":")
SHAPES = ("o", "s", "v", "D", "^", "P", "X", "<", "d", ">", "h")  # eleven, so that hues and shapes get out of step
STARS = ("*", "p", "H")
LEVEL = (0, (1, 2))

Look = dict[str, Any]


def method_names(points: Iterable[Pooled]) -> list[str]:
    """Return the methods, each once, uncompressed ones first, else in the order in which they come."""
    points = list(points)
    compressed = {point.method for point in points if point.budget is not None}
    return sorted(dict.fromkeys(point.method for point in points), key=lambda name: name in compressed)


def method_looks(points: Iterable[Pooled]) -> dict[str, Look]:
    """Return a colour, marker and line for each method; black stars for uncompressed ones.

    Give all points of a set of figures, so that a method looks the same in all of them.
    """
    points = list(points)
    names = method_names(points)
    stars = len(names) - len({point.method for point in points if point.budget is not None})  # they come first
    looks: dict[str, Look] = {
        name: {"color": COLOURS[0], "marker": STARS[index % len(STARS)], "markersize": 13, "linestyle": LEVEL}
        for index, name in enumerate(names[:stars])
    }
    return looks | {name: _look(index) for index, name in enumerate(names[stars:])}


def _look(index: int) -> Look:
    turn = index // len(HUES)
    colour = HUES[index % len(HUES)]
    return {
        "color": colour,
        "marker": SHAPES[index % len(SHAPES)],
        "linestyle": LINES[turn % len(LINES)],
        "markersize": 6.5,
        "markerfacecolor": "white" if turn % 2 else colour,
    }


@styled
def plot_positions(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw equal first choices and KL over the position in the text, a line per method.

    Args:
        points: the chosen ones, at most one budget of each method; those without positions are left out.
        path: the PNG (or PDF, SVG) to write.
        title: above both panels.
        looks: of the methods (`method_looks`), when several figures are to agree.

    Raises:
        DataError: no point has positions, or a method comes twice.
        CSKVError: the file cannot be written.
    """
    found = [point for point in points if point.positions]
    if not found:
        raise DataError("no agreement to draw; give at least one row that has positions")
    names = [point.method for point in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{', '.join(twice)} come(s) with several budgets or sizes; choose one of each method")
    looks = {name: (looks or method_looks(found))[name] for name in names}
    figure = new_figure(12.0, 5.2 + 0.24 * -(-len(looks) // 3))
    first, apart = figure.subplots(1, 2)
    for point in found:
        middles = [(part.start + part.stop) / 2 for part in point.positions]
        look = looks[point.method] | {"linewidth": 1.4}
        first.plot(middles, [100 * part.top1 for part in point.positions], **look)
        kls = [part.kl for part in point.positions]
        if max(kls) > 0:
            apart.plot(middles, kls, **look)
    first.set(title="Same first choice", xlabel="position in the text, tokens", ylabel="tokens, % (higher is better)")
    apart.set(title="KL divergence", xlabel="position in the text, tokens", ylabel="nats per token (lower is better)")
    positive = [part.kl for point in found for part in point.positions if part.kl > 0]
    if positive:
        readable_scale(apart, positive)
    else:
        apart.remove()
    add_legend(figure, looks, 12.0)
    figure.suptitle(plain(title or "Agreement with the uncompressed model along the text"))
    return save(figure, path)


def add_legend(figure: Figure, looks: Mapping[str, Look], width: float) -> None:
    """List the methods below the panels, in as many columns as fit in `width` inches."""
    from matplotlib.lines import Line2D

    labels = [shown(name) for name in looks]
    columns = max(1, min(5, len(labels), int(width / (0.62 + 0.085 * max(map(len, labels))))))
    lines: list[Look] = [{"linewidth": 1.4} | look for look in looks.values()]
    handles = [Line2D([], [], label=label, **line) for label, line in zip(labels, lines, strict=True)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, handlelength=2.8
    )


def shown(name: str, most: int = 40) -> str:
    """Write a method's name for a legend: shortened, and taken literally."""
    short = textwrap.shorten(name, most, placeholder=" …") if len(name) > most else name
    short = short if short.strip(" …") else name[: most - 1] + "…"  # one long word
    return plain(f" {short}" if short.startswith("_") else short)  # a label with an underscore first is left out

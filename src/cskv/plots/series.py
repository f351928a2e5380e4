"""Methods as series: how each is told apart, and how its points lie over the cache's bytes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cskv.evaluation.pooling import Pooled, Value
from cskv.plots.style import COLOURS, plain, plain_log, side_by_side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HUES = COLOURS[1:]  # black is for what is not compressed
LINES = ("-", "--", ":")
SHAPES = ("o", "s", "v", "D", "^", "P", "X", "<", "d", ">", "h")  # eleven, so that hues and shapes get out of step
STARS = ("*", "p", "H")
LEVEL = (0, (1, 2))
BYTES_LABEL = "allocated cache, % of the uncompressed bytes"

Look = dict[str, Any]
Span = tuple[float, float]
Read = Callable[[Pooled], Value | None]


@dataclass(frozen=True)
class Dot:
    """A point of a panel: `x` is a share of the uncompressed bytes in per cent, `y` a figure."""

    of: Pooled
    x: float
    y: Value


def method_names(points: Iterable[Pooled]) -> list[str]:
    """The methods, each once, uncompressed ones first, else in the order in which they come."""
    points = list(points)
    names = list(dict.fromkeys(point.method for point in points))
    compressed = {point.method for point in points if point.budget is not None}
    return sorted(names, key=lambda name: name in compressed)


def method_looks(points: Iterable[Pooled]) -> dict[str, Look]:
    """A colour, marker and line for each method; black stars for uncompressed ones.

    Give all points of a set of figures, so that a method looks the same in all of them.
    """
    points = list(points)
    names = method_names(points)
    compressed = {point.method for point in points if point.budget is not None}
    stars = [name for name in names if name not in compressed]
    looks: dict[str, Look] = {
        name: {"color": COLOURS[0], "marker": STARS[index % len(STARS)], "markersize": 13, "linestyle": LEVEL}
        for index, name in enumerate(stars)
    }
    return looks | {name: _look(index) for index, name in enumerate(names[len(stars) :])}


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


def dots(points: Iterable[Pooled], read: Read, factor: float = 1.0) -> list[Dot]:
    """The points that tell both the bytes and the figure; `factor` makes per cent of shares."""
    found = []
    for point in points:
        value = read(point)
        if value is not None and point.ratio:
            bounds = (None if bound is None else factor * bound for bound in (value.low, value.high))
            found.append(Dot(point, 100 * point.ratio, Value(factor * value.mean, *bounds)))
    return found


def draw_over_bytes(ax: Axes, panel: Sequence[Dot], looks: Mapping[str, Look], better: str, span: Span) -> None:
    """Draw methods as lines over the bytes, uncompressed ones as stars on a level, and the Pareto front behind.

    Args:
        ax: where.
        panel: the points.
        looks: of their methods.
        better: "more" or "less": which figures are better; it decides the front.
        span: the least and the most bytes of all panels beside each other.
    """
    steps = pareto_front([(dot.x, dot.y.mean) for dot in panel], better)
    ax.step(*zip(*steps, strict=True), where="post", color="#999999", alpha=0.35, linewidth=6, zorder=1)
    places = dict(zip(map(id, panel), _apart([dot.x for dot in panel]), strict=True))
    for name in dict.fromkeys(dot.of.method for dot in panel):
        own = sorted((dot for dot in panel if dot.of.method == name), key=lambda dot: dot.x)
        budgeted = [dot for dot in own if dot.of.budget is not None]
        if budgeted:
            xs, ys = [places[id(dot)] for dot in budgeted], [dot.y.mean for dot in budgeted]
            ax.errorbar(xs, ys, yerr=_bars(budgeted), capsize=2.5, elinewidth=0.9, linewidth=1.4, **looks[name])
        for dot in (dot for dot in own if dot.of.budget is None):
            ax.axhline(dot.y.mean, color=looks[name]["color"], linewidth=1.0, linestyle=LEVEL, zorder=1)
            star = looks[name] | {"linestyle": "none", "markersize": 13} | ({"marker": "*"} if budgeted else {})
            ax.errorbar(dot.x, dot.y.mean, yerr=_bars([dot]), capsize=2.5, zorder=5, **star)
    ax.set_xlabel(BYTES_LABEL)
    ax.set_xscale("log")
    ax.set_xlim(0.85 * span[0], 1.18 * span[1])
    plain_log(ax.xaxis, *span)


def pareto_front(points: Sequence[tuple[float, float]], better: str) -> list[tuple[float, float]]:
    """Those that no other beats with as few bytes, from few bytes to many, then level up to the most bytes."""
    sign = -1 if better == "more" else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * y < sign * front[-1][1]:
            front.append((x, y))
    return [*front, (max(x for x, _ in points), front[-1][1])]


def add_legend(figure: Figure, looks: Mapping[str, Look], width: float) -> None:
    """The methods below the panels, in as many columns as fit in `width` inches."""
    from matplotlib.lines import Line2D

    labels = [shown(name) for name in looks]
    columns = max(1, min(5, len(labels), int(width / (0.62 + 0.085 * max(map(len, labels))))))
    handles = [
        Line2D([], [], label=label, linewidth=1.4, **look) for label, look in zip(labels, looks.values(), strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, handlelength=2.8
    )


def shown(name: str, most: int = 40) -> str:
    """A method's name for a legend: shortened, and taken literally."""
    short = textwrap.shorten(name, most, placeholder=" …") if len(name) > most else name
    short = short if short.strip(" …") else name[: most - 1] + "…"  # one long word
    return plain(f" {short}" if short.startswith("_") else short)  # a label with an underscore first is left out


def _bars(found: Sequence[Dot]) -> list[list[float]] | None:
    """Return how far the ranges reach down and up; None where there is none at all."""
    if all(dot.y.low is None or dot.y.high is None for dot in found):
        return None
    down = [0.0 if dot.y.low is None else max(0.0, dot.y.mean - dot.y.low) for dot in found]
    up = [0.0 if dot.y.high is None else max(0.0, dot.y.high - dot.y.mean) for dot in found]
    return [down, up]


def _apart(xs: Sequence[float]) -> list[float]:
    """Set places that coincide on a logarithmic axis a little apart."""
    logs = [math.log(x) for x in xs]
    return [math.exp(place) for place in side_by_side(logs, 0.005 * max(max(logs) - min(logs), 0.2))]

"""KL divergence, accuracy, perplexity and agreement over the bytes that caches really take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cskv.errors import DataError
from cskv.evaluation.pooling import Pooled, Value
from cskv.plots.series import LEVEL, Look, add_legend, method_looks
from cskv.plots.style import new_figure, plain, plain_log, readable_scale, save, side_by_side, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAR = 10.0  # times below all others: the uncompressed cache's rounding is left out of a logarithmic axis
NEAR = 1.5  # times the least perplexity: what a closer look at the good ones shows

BAND = 0.16  # opacity of intervals
FRONT: dict[str, Look] = {"Pareto front": {"color": "#444444", "linewidth": 1.1, "linestyle": "-"}}

Read = Callable[[Pooled], Value | None]


@dataclass(frozen=True)
class Dot:
    """A point of a panel: `x` is a share of the uncompressed bytes in per cent, `y` a figure."""

    of: Pooled
    x: float
    y: Value


@dataclass(frozen=True)
class Panel:
    """Points over bytes, and what stands beside them; `better` is "more" or "less"."""

    dots: list[Dot]
    title: str
    label: str
    better: str
    scale: Callable[[Axes, Sequence[Dot]], object]


@styled
def plot_divergence(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw the KL divergence from the uncompressed model over cache bytes, on a logarithmic scale.

    Args:
        points: of one task and size.
        path: the PNG (or PDF, SVG) to write.
        title: above the panels.
        looks: of the methods (`method_looks`), when several figures are to agree.

    Raises:
        DataError: no point has both a KL above 0 and the cache's bytes, or they are of several tasks or sizes.
        CSKVError: the file cannot be written.
    """
    found = [point for point in points if point.kl is not None and point.kl.mean > 0]
    dots = _find_dots(found, lambda point: point.kl, "a KL divergence above 0")
    least = min((dot.y.mean for dot in dots if dot.of.budget is not None), default=0.0)
    dots = [dot for dot in dots if dot.y.mean > least / FAR]
    return _draw([Panel(dots, "", "nats per token (lower is better)", "less", _logarithmic)], path, title or "", looks)


@styled
def plot_accuracy(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw accuracy over cache bytes, a panel per protocol.

    Args:
        points: of one task and size.
        path, title, looks: as for `plot_divergence`.

    Raises:
        DataError: no point has both a score and the cache's bytes, or they are of several tasks or sizes.
        CSKVError: the file cannot be written.
    """
    found = _find_dots(points, lambda point: point.score, "a score", 100.0)
    lowest = min(dot.y.mean if dot.y.low is None else dot.y.low for dot in found)
    bounds = max(-3.0, 10 * (lowest // 10) - 3), 103
    panels = []
    for protocol in dict.fromkeys(dot.of.protocol for dot in found):
        own = [dot for dot in found if dot.of.protocol == protocol]
        panels.append(Panel(own, protocol or "", "accuracy, %", "more", lambda ax, _: ax.set_ylim(bounds)))
    return _draw(panels, path, title or "Accuracy over cache bytes", looks)


@styled
def plot_perplexity(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw perplexity over cache bytes.

    Args:
        points: of one size.
        path, title, looks: as for `plot_divergence`.

    Raises:
        DataError: no point has both a perplexity and the cache's bytes, or they are of several sizes.
        CSKVError: the file cannot be written.
    """
    found = _find_dots(points, lambda point: point.perplexity, "a perplexity")
    least = min(dot.y.mean for dot in found)
    near = [dot for dot in found if dot.y.mean <= NEAR * least]
    views = [("", found)]
    if (
        len(near) < len(found) and sum(dot.of.budget is not None for dot in near) > 1
    ):  # one method that fails would press all others into one line
        views = [("All", found), (f"Up to {NEAR:g} times the least", near)]
    panels = [Panel(dots, name, "perplexity (lower is better)", "less", _readable) for name, dots in views]
    return _draw(panels, path, title or "Perplexity over cache bytes", looks)


@styled
def plot_agreement(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw over cache bytes how often the likeliest token is that of the uncompressed model.

    Args:
        points: of one size.
        path, title, looks: as for `plot_divergence`.

    Raises:
        DataError: no point has both the figure and the cache's bytes, or they are of several sizes.
        CSKVError: the file cannot be written.
    """
    found = _find_dots(points, lambda point: point.top1, "an agreement", 100.0)
    panels = [Panel(found, "", "same first choice, % of tokens", "more", _shares)]
    return _draw(panels, path, title or "Agreement with the uncompressed model", looks)


def _find_dots(points: Iterable[Pooled], read: Read, what: str, factor: float = 1.0) -> list[Dot]:
    """Return the points that tell both the bytes and the figure; `factor` makes per cent of shares."""
    found = []
    for point in points:
        value = read(point)
        if value is not None and point.ratio:
            bounds = (None if bound is None else factor * bound for bound in (value.low, value.high))
            found.append(Dot(point, 100 * point.ratio, Value(factor * value.mean, *bounds)))
    if not found:
        raise DataError(f"no results to draw; give at least one row that has {what} and its cache's bytes")
    kinds = {(dot.of.task, dot.of.size) for dot in found}
    if len(kinds) > 1:
        raise DataError(f"results are of {sorted(kinds)}; a figure shows one task of one size: draw several")
    return found


def _logarithmic(ax: Axes, dots: Sequence[Dot]) -> None:
    """Show all means, and bands as far as they do not press these together: one may reach down to 0."""
    means = [dot.y.mean for dot in dots]
    smallest, largest = min(means), max(dot.y.mean if dot.y.high is None else dot.y.high for dot in dots)
    ax.set_yscale("log")
    plain_log(ax.yaxis, smallest, largest)
    ax.set_ylim(smallest / 1.5, 1.5 * largest)


def _readable(ax: Axes, dots: Sequence[Dot]) -> None:
    readable_scale(ax, [dot.y.mean for dot in dots])


def _shares(ax: Axes, dots: Sequence[Dot]) -> None:
    """Leave room around the points, but hardly any above 100 %."""
    _readable(ax, dots)
    low, high = ax.get_ylim()
    ax.set_ylim(low, min(high, 100 + 0.04 * (100 - low)))


def _draw(panels: Sequence[Panel], path: str | Path, title: str, looks: Mapping[str, Look] | None) -> Path:
    dots = [dot for panel in panels for dot in panel.dots]
    present = {dot.of.method for dot in dots}
    looks = looks or method_looks(dot.of for dot in dots)
    looks = {name: look for name, look in looks.items() if name in present}
    span = min(dot.x for dot in dots), max(dot.x for dot in dots)
    width = 12.0 if len(panels) > 1 else 8.5
    rows = -(-len(panels) // 2)
    figure = new_figure(width, 4.3 * rows + 0.9 + 0.24 * -(-len(looks) // 3))
    axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).flatten()
    for ax, panel in zip(axes, panels):
        _draw_panel(ax, panel, looks)
        ax.set_xlim(0.85 * span[0], 1.18 * span[1])
        plain_log(ax.xaxis, *span)
        panel.scale(ax, panel.dots)
    for ax in axes[len(panels) :]:
        ax.remove()
    add_legend(figure, looks | FRONT, width)
    figure.suptitle(plain(title))
    return save(figure, path)


def _draw_panel(ax: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    """Draw methods as lines over the bytes in bands, uncompressed ones as stars on a level, and the Pareto front."""
    steps = pareto_front([(dot.x, dot.y.mean) for dot in panel.dots], panel.better)
    ax.step(*zip(*steps, strict=True), where="post", zorder=1.5, **next(iter(FRONT.values())))
    places = dict(zip(map(id, panel.dots), _apart([dot.x for dot in panel.dots]), strict=True))
    for name in dict.fromkeys(dot.of.method for dot in panel.dots):
        own = sorted((dot for dot in panel.dots if dot.of.method == name), key=lambda dot: dot.x)
        budgeted = [dot for dot in own if dot.of.budget is not None]
        xs = [places[id(dot)] for dot in budgeted]
        if len(budgeted) > 1:
            ax.plot(xs, [dot.y.mean for dot in budgeted], linewidth=1.4, **looks[name])
            lows, highs = zip(*map(_range, budgeted), strict=True)
            ax.fill_between(xs, lows, highs, color=looks[name]["color"], alpha=BAND, linewidth=0, zorder=1)
        elif budgeted:
            ax.errorbar(xs, [budgeted[0].y.mean], yerr=_bar(budgeted[0]), capsize=2.5, elinewidth=0.9, **looks[name])
        for dot in (dot for dot in own if dot.of.budget is None):
            ax.axhline(dot.y.mean, color=looks[name]["color"], linewidth=1.0, linestyle=LEVEL, zorder=1)
            star = looks[name] | {"linestyle": "none", "markersize": 13} | ({"marker": "*"} if budgeted else {})
            ax.errorbar(dot.x, dot.y.mean, yerr=_bar(dot), capsize=2.5, zorder=5, **star)
    ax.set(title=plain(panel.title), xlabel="allocated cache, % of the uncompressed bytes", ylabel=panel.label)
    ax.set_xscale("log")


def pareto_front(points: Sequence[tuple[float, float]], better: str) -> list[tuple[float, float]]:
    """Return those that no other beats with as few bytes, from few bytes to many, then level up to the most bytes."""
    sign = -1 if better == "more" else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * y < sign * front[-1][1]:
            front.append((x, y))
    return [*front, (max(x for x, _ in points), front[-1][1])]


def _range(dot: Dot) -> tuple[float, float]:
    """Return the ends of a range; the mean twice where there is none."""
    mean, low, high = dot.y.mean, dot.y.low, dot.y.high
    return (mean, mean) if low is None or high is None else (min(low, mean), max(high, mean))


def _bar(dot: Dot) -> list[list[float]] | None:
    """Return how far a range reaches down and up; None where there is none."""
    low, high = _range(dot)
    return None if low == high else [[dot.y.mean - low], [high - dot.y.mean]]


def _apart(xs: Sequence[float]) -> list[float]:
    """Set places that coincide on a logarithmic axis a little apart."""
    logs = [math.log(x) for x in xs]
    return [math.exp(place) for place in side_by_side(logs, 0.005 * max(max(logs) - min(logs), 0.2))]

"""Accuracy, perplexity and agreement over the bytes that caches really take."""

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

NEAR = 1.5  # times the least perplexity: what a closer look at the good ones shows

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
def plot_accuracy(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw accuracy over cache bytes, a panel per protocol.

    Args:
        points: of one task and size.
        path: the PNG (or PDF, SVG) to write.
        title: above the panels.
        looks: of the methods (`method_looks`), when several figures are to agree.

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
    return _draw(panels, path, title or "Accuracy over cache bytes (bars: 95 % interval)", looks)


@styled
def plot_perplexity(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw perplexity over cache bytes; bars reach from the least to the most of several seeds.

    Args:
        points: of one size.
        path, title, looks: as for `plot_accuracy`.

    Raises:
        DataError: no point has both a perplexity and the cache's bytes, or they are of several sizes.
        CSKVError: the file cannot be written.
    """
    found = _find_dots(points, lambda point: point.perplexity, "a perplexity")
    least = min(dot.y.mean for dot in found)
    near = [dot for dot in found if dot.y.mean <= NEAR * least]
    views = [("", found)]
    if len(near) < len(found):  # one method that fails would press all others into one line
        views = [("All", found), (f"Up to {NEAR:g} times the least", near)]
    panels = [Panel(dots, name, "perplexity (lower is better)", "less", _readable) for name, dots in views]
    return _draw(panels, path, title or "Perplexity over cache bytes", looks)


@styled
def plot_agreement(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw how far the uncompressed model is agreed with, over cache bytes: equal first choices beside the KL.

    Args:
        points: of one size.
        path, title, looks: as for `plot_accuracy`.

    Raises:
        DataError: no point has both figures and the cache's bytes, or they are of several sizes.
        CSKVError: the file cannot be written.
    """
    points = list(points)
    first = _find_dots(points, lambda point: point.top1, "an agreement", 100.0)
    # The uncompressed model's KL from itself is 0, which a logarithmic axis cannot show.
    apart = [dot for dot in _find_dots(points, lambda point: point.kl, "an agreement") if dot.y.mean > 0]
    panels = [Panel(first, "Same first choice", "tokens, % (higher is better)", "more", _shares)]
    if apart:
        panels.append(Panel(apart, "KL divergence", "nats per token (lower is better)", "less", _readable))
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
    add_legend(figure, looks, width)
    figure.suptitle(plain(title))
    return save(figure, path)


def _draw_panel(ax: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    """Draw methods as lines over the bytes, uncompressed ones as stars on a level, and the Pareto front behind."""
    steps = pareto_front([(dot.x, dot.y.mean) for dot in panel.dots], panel.better)
    ax.step(*zip(*steps, strict=True), where="post", color="#999999", alpha=0.35, linewidth=6, zorder=1)
    places = dict(zip(map(id, panel.dots), _apart([dot.x for dot in panel.dots]), strict=True))
    for name in dict.fromkeys(dot.of.method for dot in panel.dots):
        own = sorted((dot for dot in panel.dots if dot.of.method == name), key=lambda dot: dot.x)
        budgeted = [dot for dot in own if dot.of.budget is not None]
        if budgeted:
            xs, ys = [places[id(dot)] for dot in budgeted], [dot.y.mean for dot in budgeted]
            ax.errorbar(xs, ys, yerr=_bars(budgeted), capsize=2.5, elinewidth=0.9, linewidth=1.4, **looks[name])
        for dot in (dot for dot in own if dot.of.budget is None):
            ax.axhline(dot.y.mean, color=looks[name]["color"], linewidth=1.0, linestyle=LEVEL, zorder=1)
            star = looks[name] | {"linestyle": "none", "markersize": 13} | ({"marker": "*"} if budgeted else {})
            ax.errorbar(dot.x, dot.y.mean, yerr=_bars([dot]), capsize=2.5, zorder=5, **star)
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

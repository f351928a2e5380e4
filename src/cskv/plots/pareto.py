"""Accuracy, perplexity and agreement over the bytes that caches really take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cskv.errors import DataError
from cskv.evaluation.pooling import Pooled
from cskv.plots.series import Dot, Look, Read, add_legend, dots, draw_over_bytes, method_looks
from cskv.plots.style import new_figure, plain, readable_scale, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 1.5  # times the least perplexity: what a closer look at the good ones shows


@dataclass(frozen=True)
class Panel:
    """Points over bytes, and what stands beside them; `better` is "more" or "less"."""

    dots: list[Dot]
    title: str
    label: str
    better: str
    scale: Callable[[Axes, Sequence[Dot]], None]


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
    found = _found(points, lambda point: point.score, "a score", 100.0)
    protocols = list(dict.fromkeys(dot.of.protocol for dot in found))
    lowest = min(dot.y.mean if dot.y.low is None else dot.y.low for dot in found)
    panels = [
        Panel(
            [dot for dot in found if dot.of.protocol == protocol],
            protocol or "",
            "accuracy, %",
            "more",
            lambda ax, _: ax.set_ylim(max(-3.0, 10 * (lowest // 10) - 3), 103) and None,
        )
        for protocol in protocols
    ]
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
    found = _found(points, lambda point: point.perplexity, "a perplexity")
    label = "perplexity (lower is better)"
    panels = [Panel(found, "", label, "less", _readable)]
    least = min(dot.y.mean for dot in found)
    near = [dot for dot in found if dot.y.mean <= NEAR * least]
    if len(near) < len(found):  # one method that fails would press all others into one line
        panels = [Panel(found, "All", label, "less", _readable)]
        panels.append(Panel(near, f"Up to {NEAR:g} times the least", label, "less", _readable))
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
    first = _found(points, lambda point: point.top1, "an agreement", 100.0)
    # The uncompressed model's KL from itself is 0, which a logarithmic axis cannot show.
    apart = [dot for dot in _found(points, lambda point: point.kl, "an agreement") if dot.y.mean > 0]
    panels = [Panel(first, "Same first choice", "tokens, % (higher is better)", "more", _shares)]
    if apart:
        panels.append(Panel(apart, "KL divergence", "nats per token (lower is better)", "less", _readable))
    return _draw(panels, path, title or "Agreement with the uncompressed model", looks)


def _found(points: Iterable[Pooled], read: Read, what: str, factor: float = 1.0) -> list[Dot]:
    found = dots(points, read, factor)
    if not found:
        raise DataError(f"no results to draw; give at least one row that has {what} and its cache's bytes")
    kinds = {(dot.of.task, dot.of.size) for dot in found}
    if len(kinds) > 1:
        raise DataError(f"results are of {sorted(kinds)}; a figure shows one task of one size: draw several")
    return found


def _readable(ax: Axes, panel: Sequence[Dot]) -> None:
    figures = [dot.y.mean for dot in panel]
    readable_scale(ax, min(figures), max(figures))


def _shares(ax: Axes, panel: Sequence[Dot]) -> None:
    """Room around the points, but hardly any above 100 %."""
    _readable(ax, panel)
    low, high = ax.get_ylim()
    ax.set_ylim(low, min(high, 100 + 0.04 * (100 - low)))


def _draw(panels: Sequence[Panel], path: str | Path, title: str, looks: Mapping[str, Look] | None) -> Path:
    points = [dot.of for panel in panels for dot in panel.dots]
    looks = looks or method_looks(points)
    places = [dot.x for panel in panels for dot in panel.dots]
    span = (min(places), max(places))
    present = {point.method for point in points}
    looks = {name: look for name, look in looks.items() if name in present}
    width = 12.0 if len(panels) > 1 else 8.5
    rows = -(-len(panels) // 2)
    figure = new_figure(width, 4.3 * rows + 0.9 + 0.24 * -(-len(looks) // 3))
    axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).flatten()
    for ax, panel in zip(axes, panels):
        draw_over_bytes(ax, panel.dots, looks, panel.better, span)
        ax.set(title=plain(panel.title), ylabel=panel.label)
        panel.scale(ax, panel.dots)
    for ax in axes[len(panels) :]:
        ax.remove()
    add_legend(figure, looks, width)
    figure.suptitle(plain(title))
    return save(figure, path)

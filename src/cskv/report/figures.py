"""The figures of a report, each a PNG file with its words."""

from __future__ import annotations

import base64
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from cskv import plots
from cskv.evaluation.pooling import Pooled
from cskv.evaluation.settings import CONTINUATION
from cskv.evaluation.spectra import Spectrum
from cskv.plots.series import method_names
from cskv.report.text import budget_text, sizes_text, task_text


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        path: the PNG file.
        title: above it.
        alt: says what it shows, for those who cannot see it.
        width, height: in pixels.
        uri: the file's content, for the page to carry.
    """

    path: Path
    title: str
    alt: str
    width: int
    height: int
    uri: str


class Drawing:
    """Draws figures into a folder, each under a name of its own, methods alike in all of them."""

    def __init__(self, folder: Path, points: Sequence[Pooled]):
        self.folder = folder
        self.looks = plots.method_looks(points)
        self.names: set[str] = set()

    def add(self, name: str, title: str, alt: str, plot: Callable[..., Path], shown: object, *options: Any) -> Figure:
        """Call `plot` with what is shown, a path and the options; `name` becomes a file name whatever it holds."""
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "figure"
        unique = next(s for s in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))) if s not in self.names)
        self.names.add(unique)
        path = plot(shown, self.folder / f"{unique}.png", *options)
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # of the PNG header
        uri = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
        return Figure(path, title, alt, width, height, uri)


def draw_sections(points: Sequence[Pooled], spectra: Sequence[Spectrum], folder: Path) -> dict[str, list[Figure]]:
    """Draw everything that there is something to draw of; return each section's figures.

    Raises:
        CSKVError: the folder cannot be written.
    """
    drawing = Drawing(folder, points)
    points = sorted(points, key=lambda point: point.task == CONTINUATION)  # texts read from their beginning come first
    sections = {
        "divergence": _divergence(points, drawing),
        "accuracy": _accuracy(points, drawing),
        "perplexity": _perplexity(points, drawing),
        "agreement": _agreement(points, drawing),
        "needles": _needles(points, drawing),
        "spectra": _spectra(spectra, drawing),
    }
    return {name: list(figures) for name, figures in sections.items()}


def _accuracy(points: Sequence[Pooled], drawing: Drawing) -> Iterator[Figure]:
    scored = [point for point in points if point.score is not None and point.ratio]
    for (task, size), own in _by(scored, "task", "size").items():
        title = task_text(task, [size])
        heading = f"Accuracy over cache bytes: {title}"
        protocols = list(dict.fromkeys(point.protocol for point in own if point.protocol))
        panels = f"Panels: {', '.join(protocols)}." if protocols else ""
        alt = f"Line chart: accuracy in per cent over allocated cache bytes, {title}. {panels} {_methods(own)}"
        yield drawing.add(f"accuracy {task} {size}", title, alt, plots.plot_accuracy, own, heading, drawing.looks)


def _perplexity(points: Sequence[Pooled], drawing: Drawing) -> Iterator[Figure]:
    known = [point for point in points if point.perplexity is not None and point.ratio]
    for (task, size), own in _by(known, "task", "size").items():
        title = _texts(task, size)
        heading = f"Perplexity over cache bytes\n{title}"
        alt = f"Line chart: perplexity over allocated cache bytes, {title}. {_methods(own)}"
        yield drawing.add(f"{task} perplexity {size}", title, alt, plots.plot_perplexity, own, heading, drawing.looks)


def _divergence(points: Sequence[Pooled], drawing: Drawing) -> Iterator[Figure]:
    apart = [point for point in points if point.kl is not None and point.kl.mean > 0 and point.ratio]
    for (task, size), own in _by(apart, "task", "size").items():
        title = _texts(task, size)
        heading = f"KL divergence from the uncompressed model over cache bytes\n{title}"
        alt = f"Line chart: KL divergence over allocated cache bytes, {title}. {_methods(own)}"
        yield drawing.add(f"{task} kl {size}", title, alt, plots.plot_divergence, own, heading, drawing.looks)


def _agreement(points: Sequence[Pooled], drawing: Drawing) -> Iterator[Figure]:
    looks = drawing.looks
    for (task, size), own in _by([point for point in points if point.top1 is not None], "task", "size").items():
        if any(point.ratio for point in own):
            title = _texts(task, size)
            heading = f"Same first choice as the uncompressed model over cache bytes\n{title}"
            alt = f"Line chart: equal first choices over allocated cache bytes. {_methods(own)}"
            yield drawing.add(f"{task} over bytes {size}", title, alt, plots.plot_agreement, own, heading, looks)
        budgets = _by([point for point in own if point.positions and point.budget is not None], "budget")
        if budgets:  # the one that most methods share, the smallest of those
            budget, chosen = min(budgets.items(), key=lambda group: (-len(group[1]), group[0]))
            title = f"{_texts(task, size)}: along the text, at {budget_text(budget)}"
            heading = f"Agreement with the uncompressed model\n{title}"
            alt = f"Line charts: equal first choices and KL divergence along the text. {_methods(chosen)}"
            yield drawing.add(f"{task} positions {size}", title, alt, plots.plot_positions, chosen, heading, looks)


def _texts(task: str, size: int) -> str:
    read = "continued after a prefill" if task == CONTINUATION else "read from their beginning"
    return f"Texts of {sizes_text(task, [size])}, {read}"


def _needles(points: Sequence[Pooled], drawing: Drawing) -> Iterator[Figure]:
    for (task, protocol), own in _by([point for point in points if point.cells], "task", "protocol").items():
        title = f"{task}, {protocol}" if protocol else task
        alt = f"Heat maps: share of needles found by depth and length of the text, {title}. {_methods(own)}"
        yield drawing.add(f"needles {title}", title, alt, plots.plot_needles, own, f"Needles found: {title}")


def _spectra(spectra: Sequence[Spectrum], drawing: Drawing) -> Iterator[Figure]:
    if spectra:
        layers = len({spectrum.layer for spectrum in spectra})
        alt = f"Line charts: normalised singular values of keys and values of {layers} layers, on a logarithmic scale."
        yield drawing.add("spectra", "Singular values", alt, plots.plot_spectra, spectra)


def _by(points: Iterable[Pooled], *names: str) -> dict[Any, list[Pooled]]:
    """Group points by what their attributes of these names hold, in order of first appearance."""
    groups = defaultdict(list)
    for point in points:
        groups[attrgetter(*names)(point)].append(point)
    return groups


def _methods(points: Iterable[Pooled]) -> str:
    return f"Methods: {', '.join(method_names(points))}. The figures are in summary.csv."

"""The figures of a report, each a PNG file with its words."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cskv.evaluation.pooling import Pooled
from cskv.evaluation.spectra import Spectrum
from cskv.plots import (
    method_looks,
    plot_accuracy,
    plot_agreement,
    plot_needles,
    plot_perplexity,
    plot_positions,
    plot_spectra,
)
from cskv.plots.series import Look, method_names
from cskv.report.text import budget_text, sizes_text, task_text

Chosen = Sequence[Pooled]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        path: the PNG file.
        title: above it.
        caption: below it.
        alt: says what it shows, for those who cannot see it.
        width, height: in pixels.
        uri: the file's content, for the page to carry.
    """

    path: Path
    title: str
    caption: str
    alt: str
    width: int
    height: int
    uri: str


@dataclass(frozen=True)
class Section:
    """Figures that belong together."""

    name: str
    title: str
    words: str
    figures: list[Figure]


class Drawing:
    """Draws figures into a folder, each under a name of its own."""

    def __init__(self, folder: Path, looks: Mapping[str, Look]):
        self.folder = folder
        self.looks = looks
        self.names: set[str] = set()

    def add(self, draw: Callable[[Path], Path], name: str, title: str, alt: str, caption: str = "") -> Figure:
        """Draw one; `name` becomes a file name whatever it holds."""
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "figure"
        unique = next(s for s in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))) if s not in self.names)
        self.names.add(unique)
        path = draw(self.folder / f"{unique}.png")
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # of the PNG header
        uri = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
        return Figure(path, title, caption, alt, width, height, uri)


def draw_sections(points: Chosen, spectra: Sequence[Spectrum], folder: Path) -> list[Section]:
    """Draw everything that there is something to draw of.

    Raises:
        CSKVError: the folder cannot be written.
    """
    drawing = Drawing(folder, method_looks(points))
    sections = [
        _accuracy(points, drawing),
        _perplexity(points, drawing),
        _agreement(points, drawing),
        _needles(points, drawing),
        _spectra(spectra, drawing),
    ]
    return [section for section in sections if section.figures]


def _accuracy(points: Chosen, drawing: Drawing) -> Section:
    scored = [point for point in points if point.score is not None and point.ratio]
    figures = []
    for (task, size), own in _by(scored, lambda point: (point.task, point.size)).items():
        title = task_text(task, [size])
        alt = f"Line chart: accuracy in per cent over allocated cache bytes, {title}. {_panels(own)} {_methods(own)}"
        draw = _drawer(plot_accuracy, own, f"Accuracy over cache bytes: {title}", drawing.looks)
        figures.append(drawing.add(draw, f"accuracy {task} {size}", title, alt))
    words = (
        "One line per method over its budgets; bars are 95 % intervals; several seeds are pooled. The grey step line "
        "is the Pareto front: no method does better with as few bytes. Stars and dotted levels are uncompressed. "
        "Points of equal bytes are set side by side."
    )
    return Section("accuracy", "Accuracy over bytes", words, figures)


def _perplexity(points: Chosen, drawing: Drawing) -> Section:
    known = [point for point in points if point.perplexity is not None and point.ratio]
    figures = []
    for (task, size), own in _by(known, lambda point: (point.task, point.size)).items():
        title = task_text(task, [size])
        alt = f"Line chart: perplexity over allocated cache bytes, {title}. {_methods(own)}"
        draw = _drawer(plot_perplexity, own, f"Perplexity over cache bytes: {title}", drawing.looks)
        figures.append(drawing.add(draw, f"{task} perplexity {size}", title, alt))
    words = "Lower is better. Several seeds: the mean in nats, and bars from the least to the most of them."
    return Section("perplexity", "Perplexity over bytes", words, figures)


def _agreement(points: Chosen, drawing: Drawing) -> Section:
    figures = []
    for (task, size), own in _by([p for p in points if p.kl is not None], lambda p: (p.task, p.size)).items():
        if any(point.ratio for point in own):
            title = f"{task} over bytes, {sizes_text(task, [size])}"
            alt = f"Line charts: equal first choices and KL divergence over allocated cache bytes. {_methods(own)}"
            draw = _drawer(plot_agreement, own, f"Agreement over cache bytes: {task_text(task, [size])}", drawing.looks)
            figures.append(drawing.add(draw, f"{task} over bytes {size}", title, alt))
        budget, chosen = _one_budget([point for point in own if point.positions and point.budget is not None])
        if chosen:
            title = f"{task} along the text, {sizes_text(task, [size])}, budget {budget_text(budget)}"
            alt = (
                f"Line charts: equal first choices and KL divergence over the position in the text. {_methods(chosen)}"
            )
            draw = _drawer(plot_positions, chosen, f"Agreement: {title}", drawing.looks)
            figures.append(drawing.add(draw, f"{task} positions {size}", title, alt))
    words = (
        "How often the likeliest next token is that of the uncompressed model, and how far the distributions differ."
    )
    return Section("agreement", "Agreement with the uncompressed model", words, figures)


def _needles(points: Chosen, drawing: Drawing) -> Section:
    figures = []
    for (task, protocol), own in _by([p for p in points if p.cells], lambda p: (p.task, p.protocol)).items():
        title = f"{task}, {protocol}" if protocol else task
        alt = f"Heat maps: share of needles found by depth and length of the text, {title}. {_methods(own)}"

        def draw(path: Path, own: Chosen = own, title: str = title) -> Path:
            return plot_needles(own, path, f"Needles found: {title}")

        figures.append(drawing.add(draw, f"needles {title}", title, alt))
    words = (
        "The share of needles found, in per cent: depth in the text from top to bottom, its length from left to right."
    )
    return Section("needles", "Needle heat maps", words, figures)


def _spectra(spectra: Sequence[Spectrum], drawing: Drawing) -> Section:
    figures = []
    if spectra:
        layers = len({spectrum.layer for spectrum in spectra})
        alt = f"Line charts: normalised singular values of keys and values of {layers} layers, on a logarithmic scale."
        draw = lambda path: plot_spectra(spectra, path)  # noqa: E731 (one expression, used once)
        figures.append(drawing.add(draw, "spectra", "Singular values", alt))
    words = "How fast the singular values of keys and values fall: the faster, the fewer channels need to be kept."
    return Section("spectra", "Spectra", words, figures)


def _drawer(
    plot: Callable[[Iterable[Pooled], Path, str, Mapping[str, Look]], Path],
    points: Chosen,
    title: str,
    looks: Mapping[str, Look],
) -> Callable[[Path], Path]:
    return lambda path: plot(points, path, title, looks)


def _one_budget(points: Chosen) -> tuple[float | None, list[Pooled]]:
    """The results at the budget that most methods share, the smallest of those."""
    groups = _by(points, lambda point: point.budget or 0.0)
    budget = min(groups, key=lambda budget: (-len(groups[budget]), budget), default=None)
    return budget, groups.get(budget or 0.0, [])


def _by(points: Chosen, key: Callable[[Pooled], Key]) -> dict[Key, list[Pooled]]:
    """Groups in order of first appearance."""
    groups: dict[Key, list[Pooled]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def _panels(points: Chosen) -> str:
    protocols = list(dict.fromkeys(point.protocol for point in points if point.protocol))
    return f"Panels: {', '.join(protocols)}." if protocols else ""


def _methods(points: Collection[Pooled]) -> str:
    return f"Methods: {', '.join(method_names(points))}. The figures are in summary.csv."

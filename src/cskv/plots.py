"""Results and result files to figures. matplotlib is imported inside, and draws off screen."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cskv.atomic import write_atomically
from cskv.errors import DataError
from cskv.evaluation.spectra import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common colour blindness, and by the markers in black and white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "v", "D", "^", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SOURCES = {"weight": "weights", "calibrated": "calibrated activations"}
PROJECTIONS = {"k": "Keys", "v": "Values"}
FLOOR = 1e-4

P = ParamSpec("P")
T = TypeVar("T")


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Let a figure be drawn in our style without changing the caller's settings."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def plot_spectra(spectra: Iterable[Spectrum], path: str | Path, title: str | None = None) -> Path:
    """Draw normalised singular values per layer, keys beside values, weights above calibrated activations.

    Raises:
        DataError: no spectra.
        CSKVError: the file cannot be written.
    """
    spectra = list(spectra)
    if not spectra:
        raise DataError("no spectra to draw; give those of at least one layer")
    sources = [source for source in SOURCES if any(s.source == source for s in spectra)]
    layers = sorted({spectrum.layer for spectrum in spectra})
    figure = _figure(10.0, 3.6 * len(sources) + 0.4)
    axes = figure.subplots(len(sources), 2, sharex=True, sharey=True, squeeze=False)
    colour = _layer_colours(figure, axes, layers)
    floor = max(FLOOR, 0.7 * min(min(spectrum.normalised) for spectrum in spectra))
    for row, source in enumerate(sources):
        for column, projection in enumerate(PROJECTIONS):
            ax = axes[row][column]
            for spectrum in (s for s in spectra if (s.source, s.projection) == (source, projection)):
                values = [max(value, floor / 10) for value in spectrum.normalised]
                ax.plot(range(1, len(values) + 1), values, color=colour[spectrum.layer], linewidth=1.6)
            ax.set(title=f"{PROJECTIONS[projection]}: {SOURCES[source]}", yscale="log", ylim=(floor, 1.5))
            if row == len(sources) - 1:
                ax.set_xlabel("singular value index")
        axes[row][0].set_ylabel("singular value / largest")
    figure.suptitle(title or "Singular values of keys and values, per layer")
    return _save(figure, path)


@_styled
def plot_training(
    log: str | Path | Sequence[str | Path], path: str | Path, labels: Sequence[str] | None = None
) -> Path:
    """Draw the loss over steps from one or several JSON-lines training logs (one object with step and loss a line).

    Args:
        log: the log files.
        path: the PNG (or PDF, SVG) to write.
        labels: one name per log; the files' stems when None.

    Raises:
        DataError: a log is missing, is not JSON lines, or holds no loss.
        CSKVError: the file cannot be written.
    """
    logs = [Path(log)] if isinstance(log, (str, Path)) else [Path(entry) for entry in log]
    labels = [entry.stem for entry in logs] if labels is None else labels
    figure = _figure(7.5, 4.5)
    ax = figure.subplots()
    smallest, largest = math.inf, 0.0
    for index, (entry, label) in enumerate(zip(logs, labels, strict=True)):
        steps, losses = _read_losses(entry)
        colour = COLOURS[(index + 1) % len(COLOURS)]
        ax.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(steps, _smoothed(losses), color=colour, linewidth=2.0, label=label)
        smallest, largest = min(smallest, *losses), max(largest, *losses)
    ax.set(xlabel="step", ylabel="reconstruction loss, summed over layers")
    _readable_scale(ax, smallest, largest)
    ax.set_title("Layer-wise reconstruction (bold: moving mean)")
    ax.legend(frameon=False)
    return _save(figure, path)


@_styled
def plot_demo(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str | None = None) -> Path:
    """Draw accuracy (with its interval) and perplexity over cache bytes per token, one point per row.

    Args:
        rows: each with name, bytes_per_token, accuracy, low, high, perplexity and num_lines.
        path: the PNG (or PDF, SVG) to write.
        title: above both panels.

    Raises:
        DataError: no rows.
        CSKVError: the file cannot be written.
    """
    if not rows:
        raise DataError("no results to draw; give at least one row")
    figure = _figure(10.0, 5.0)
    accuracy, perplexity = figure.subplots(1, 2)
    for index, (row, x) in enumerate(zip(rows, _dodged([row["bytes_per_token"] for row in rows]), strict=True)):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 9}
        share, low, high = (100 * row[name] for name in ("accuracy", "low", "high"))
        spread = [[share - low], [high - share]]
        accuracy.errorbar(x, share, yerr=spread, capsize=4, linestyle="none", label=row["name"], **style)
        perplexity.plot(x, row["perplexity"], linestyle="none", **style)
    accuracy.set(title=f"LongEval lines, {rows[0]['num_lines']} lines", ylabel="accuracy, % (95 % interval)")
    lowest = 100 * min(row["low"] for row in rows)
    accuracy.set_ylim(max(-5.0, 10 * (lowest // 10) - 5), 101)
    perplexity.set(title="Held-out text, through the cache", ylabel="perplexity (lower is better)")
    perplexities = [row["perplexity"] for row in rows]
    _readable_scale(perplexity, min(perplexities), max(perplexities))
    for ax in (accuracy, perplexity):
        ax.set_xlabel("real cache bytes per token (equal ones side by side)")
        ax.set_xlim(0, 1.08 * max(row["bytes_per_token"] for row in rows))
    handles, names = accuracy.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(rows)), frameon=False)
    figure.suptitle(title or "What a smaller KV cache costs")
    return _save(figure, path)


@_styled
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
    figure = _figure(max(5.6, 2.2 + 0.55 * len(layers)), 2.6)
    ax = figure.subplots()
    ax.grid(False)
    image = ax.imshow(table, cmap="cividis", aspect="auto", vmin=0, vmax=most)
    for y, row in enumerate(table):
        for x, rank in enumerate(row):
            ax.text(x, y, str(rank), ha="center", va="center", color="white" if rank < 0.55 * most else "black")
    ax.set(xlabel="layer", xticks=range(len(layers)), xticklabels=layers, yticks=(0, 1), yticklabels=("keys", "values"))
    figure.suptitle(title or "Latents kept per layer")  # of the figure: few layers make a narrow map
    figure.colorbar(image, ax=ax, label="latents")
    return _save(figure, path)


@_styled
def plot_losses(
    losses: Mapping[str, Sequence[tuple[int, float, float]]], path: str | Path, title: str | None = None
) -> Path:
    """Draw the reconstruction loss of each method over layers, keys beside values.

    Args:
        losses: method -> (layer index, loss of keys, loss of values) of each layer.
        path: the PNG (or PDF, SVG) to write.
        title: above both panels.

    Raises:
        DataError: no method.
        CSKVError: the file cannot be written.
    """
    if not losses:
        raise DataError("no losses to draw; give those of at least one method")
    figure = _figure(10.0, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    for index, (method, rows) in enumerate(losses.items()):
        style = {"color": COLOURS[(index + 1) % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        style["linestyle"] = "-" if index < len(COLOURS) - 1 else "--"  # colours come again; black is not begun with
        for column, ax in enumerate(axes, start=1):
            ax.plot([row[0] for row in rows], [row[column] for row in rows], label=method, **style)
    for ax, name in zip(axes, PROJECTIONS.values(), strict=True):
        ax.set(
            title=name,
            xlabel="layer",
            yscale="log",
            xticks=sorted({row[0] for rows in losses.values() for row in rows}),
        )
    axes[0].set_ylabel("mean squared error per channel")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(losses)), frameon=False)
    figure.suptitle(title or "Reconstruction loss per layer")
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window: `Figure` with the Agg canvas leaves pyplot and the user's backend alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    kind = path.suffix.lstrip(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise DataError(f"cannot draw to {path}: {path.suffix} is no image format here; use .png, .pdf or .svg")
    write_atomically(path, lambda file: figure.savefig(file, format=kind))
    return path


def _layer_colours(figure: Figure, axes: Any, layers: Sequence[int]) -> dict[int, Any]:
    """A colour per layer from a perceptually even scale, and the legend (few layers) or colour bar (many)."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.lines import Line2D

    scale = colormaps["viridis"]
    colour = {layer: scale(0.92 * index / max(1, len(layers) - 1)) for index, layer in enumerate(layers)}
    if len(layers) <= 8:
        handles = [Line2D([], [], color=colour[layer], linewidth=2, label=f"layer {layer}") for layer in layers]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(layers)), frameon=False)
    else:
        norm = BoundaryNorm([layer - 0.5 for layer in [*layers, layers[-1] + 1]], scale.N)
        figure.colorbar(ScalarMappable(norm, scale), ax=axes, label="layer", ticks=layers[:: max(1, len(layers) // 8)])
    return colour


def _dodged(xs: Sequence[float]) -> list[float]:
    """The same positions, with those that coincide set side by side, so that no point hides another."""
    step = 0.02 * max(xs)
    result = []
    for index, x in enumerate(xs):
        alike = [i for i, other in enumerate(xs) if abs(other - x) < step]
        result.append(x + step * (alike.index(index) - (len(alike) - 1) / 2))
    return result


def _readable_scale(ax: Axes, smallest: float, largest: float) -> None:
    """Logarithmic, with plain numbers, where values differ much; linear otherwise."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if 0 < 4 * smallest < largest:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.margins(y=0.15)


def _read_losses(path: Path) -> tuple[list[int], list[float]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        points = [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read the training log {path}: {error}; expected JSON lines with step and loss"
        ) from error
    if not points:
        raise DataError(f"the training log {path} holds no loss; expected JSON lines with step and loss")
    return [step for step, _ in points], [loss for _, loss in points]


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a twentieth of the values around each; fewer at both ends."""
    half = len(values) // 40
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]

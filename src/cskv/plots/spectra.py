"""Singular value spectra as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskv.errors import DataError
from cskv.evaluation.spectra import Spectrum
from cskv.plots.style import PROJECTIONS, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCES = {"weight": "weights", "calibrated": "calibrated activations"}
FLOOR = 1e-4


@styled
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
    figure = new_figure(10.0, 3.6 * len(sources) + 0.4)
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
    return save(figure, path)


def _layer_colours(figure: Figure, axes: Any, layers: Sequence[int]) -> dict[int, Any]:
    """Give each layer a colour of a perceptually even scale, and draw the legend (few layers) or colour bar (many)."""
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

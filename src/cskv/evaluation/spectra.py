"""Redundancy of the channels of keys and values: singular value spectra per layer (the paper's first figure).

For a weight W the spectrum is that of W itself. For calibrated keys y = W x + b it is that of the (tokens, kv_dim)
matrix of all keys, scaled by 1/sqrt(tokens): the square roots of the eigenvalues of the second moment E[y y^T].
"""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cskv.calibration.statistics import Statistics
from cskv.errors import DataError
from cskv.files import write_text
from cskv.models.sites import find_sites
from cskv.models.survey import survey

ENERGY_SHARES = (0.90, 0.95, 0.99)
COLUMNS = ("layer", "projection", "source", "index", "value", "normalised", "cumulative_energy")


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix, largest first.

    Attributes:
        layer: the layer's index in the cache.
        projection: "k" or "v".
        source: "weight" or "calibrated".
        values: singular values, descending, not normalised.
    """

    layer: int
    projection: str
    source: str
    values: tuple[float, ...]

    @property
    def normalised(self) -> tuple[float, ...]:
        """Return the values divided by the largest; all 0 for a matrix of zeros."""
        largest = self.values[0]
        return tuple(value / largest if largest else 0.0 for value in self.values)

    @cached_property
    def cumulative_energy(self) -> tuple[float, ...]:
        """Return the share of the squared sum that the first 1, 2, ... values hold; the last is 1."""
        sums = list(itertools.accumulate(value * value for value in self.values))
        return tuple(partial / sums[-1] if sums[-1] else 1.0 for partial in sums)

    def rank_for(self, share: float) -> int:
        """Return the fewest singular values that hold at least `share` of the energy, `share` in (0, 1]."""
        # The slack lets exact shares of float sums count, such as 0.9 of ten equal values.
        return 1 + bisect.bisect_left(self.cumulative_energy, share - 1e-12)


def weight_spectra(model: nn.Module) -> list[Spectrum]:
    """Return the spectra of every attention site's K and V weights, K before V, in cache order.

    Raises:
        UnsupportedModelError: the model has no site.
    """
    return [
        Spectrum(site.layer_idx, name, "weight", tuple(torch.linalg.svdvals(weight.detach().double()).tolist()))
        for site in find_sites(model)
        for name, weight in (("k", site.k.weight), ("v", site.v.weight))
    ]


def moment_spectrum(moment: Float[Tensor, "kv_dim kv_dim"], layer: int, projection: str) -> Spectrum:
    """Return the spectrum of calibrated keys or values from their second moment E[y y^T].

    Raises:
        DataError: the moment is not finite.
    """
    if not torch.isfinite(moment).all():
        raise DataError(f"the second moment of layer {layer} {projection} is not finite; calibrate on other text")
    eigenvalues = torch.linalg.eigvalsh(moment.detach().to(torch.float64))
    values = eigenvalues.flip(0).clamp(min=0.0).sqrt()  # rounding leaves tiny negative eigenvalues
    return Spectrum(layer, projection, "calibrated", tuple(values.tolist()))


def calibrated_spectra(model: nn.Module, statistics: Statistics) -> list[Spectrum]:
    """Return the spectra of calibrated keys and values, K before V, in cache order.

    Args:
        model: the model that was calibrated.
        statistics: from `cskv.calibration.calibrate.calibrate(..., covariance=True)`.

    Raises:
        DataError: the statistics hold no second moments, or they are not finite.
        AdapterError: the statistics belong to another model.
    """
    found = survey(model)
    statistics.check_fits(found)
    return [
        moment_spectrum(statistics.get(site.layer_idx, f"{projection}.moment"), site.layer_idx, projection)
        for site in found.sites
        for projection in ("k", "v")
    ]


def summary_rows(spectra: Iterable[Spectrum]) -> list[dict[str, Any]]:
    """Return a row per spectrum: layer, projection, source, values, rank_90, rank_95, rank_99 (of that energy)."""
    return [
        {
            "layer": spectrum.layer,
            "projection": spectrum.projection,
            "source": spectrum.source,
            "values": len(spectrum.values),
            **{f"rank_{round(100 * share)}": spectrum.rank_for(share) for share in ENERGY_SHARES},
        }
        for spectrum in spectra
    ]


def write_csv(spectra: Iterable[Spectrum], path: str | Path) -> Path:
    """Write one row per singular value, atomically.

    Columns: layer, projection, source, index (from 1), value, normalised, cumulative_energy.

    Raises:
        CSKVError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for spectrum in spectra:
        columns = zip(spectrum.values, spectrum.normalised, spectrum.cumulative_energy, strict=True)
        for index, numbers in enumerate(columns, start=1):
            formatted = [f"{number:.9g}" for number in numbers]
            writer.writerow([spectrum.layer, spectrum.projection, spectrum.source, index, *formatted])
    write_text(path, text.getvalue())
    return Path(path)


def read_csv(path: str | Path) -> list[Spectrum]:
    """Read spectra that `write_csv` wrote.

    Raises:
        DataError: there is no such file, or it is of another kind.
    """
    try:
        rows = list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines(), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read the spectra {path}: {error}") from error
    if not rows or tuple(rows[0]) != COLUMNS:
        raise DataError(f"{path} holds no spectra; expected the columns {', '.join(COLUMNS)}, as `cskv analyze` writes")
    values: dict[tuple[int, str, str], list[float]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            value = float(row["value"])
            known = row["projection"] in ("k", "v") and row["source"] in ("weight", "calibrated")
            if not known or not 0.0 <= value < math.inf:
                raise ValueError(f"{row['projection']}, {row['source']}, {row['value']}")
            values.setdefault((int(row["layer"]), row["projection"], row["source"]), []).append(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"line {number} of {path} holds no singular value: {error}; run `cskv analyze`") from error
    return [Spectrum(*key, tuple(sorted(found, reverse=True))) for key, found in values.items()]

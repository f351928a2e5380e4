"""How redundant the channels of keys and values are: singular value spectra per layer (the paper's first figure).

For a weight W the spectrum is that of W itself. For calibrated keys y = W x + b it is that of the (tokens, kv_dim) matrix
of all keys, scaled by 1/sqrt(tokens): the square roots of the eigenvalues of the second moment E[y y^T].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

ENERGY_SHARES = (0.90, 0.95, 0.99)


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
        """The values divided by the largest."""
        raise NotImplementedError

    @property
    def cumulative_energy(self) -> tuple[float, ...]:
        """The share of the squared sum that the first 1, 2, ... values hold; the last is 1."""
        raise NotImplementedError

    def rank_for(self, share: float) -> int:
        """The fewest singular values that hold at least `share` of the energy."""
        raise NotImplementedError


def weight_spectra(model: nn.Module) -> list[Spectrum]:
    """The spectra of every attention site's K and V weights, K before V, in cache order."""
    raise NotImplementedError


def moment_spectrum(moment: Float[Tensor, "kv_dim kv_dim"], layer: int, projection: str) -> Spectrum:
    """The spectrum of calibrated keys or values from their second moment E[y y^T].

    Raises:
        DataError: the moment is not finite.
    """
    raise NotImplementedError


def calibrated_spectra(model: nn.Module, statistics: Any) -> list[Spectrum]:
    """The spectra of calibrated K and V from `cskv.calibration` statistics collected with `covariance=True`.

    Raises:
        DataError: the statistics hold no second moments or belong to another model.
    """
    raise NotImplementedError


def summary_rows(spectra: Iterable[Spectrum]) -> list[dict[str, Any]]:
    """One row per spectrum: layer, projection, source, kv_dim, rank_90, rank_95, rank_99."""
    raise NotImplementedError


def write_csv(spectra: Iterable[Spectrum], path: str | Path) -> Path:
    """Write one row per singular value (layer, projection, source, index, value, normalised, cumulative_energy)."""
    raise NotImplementedError

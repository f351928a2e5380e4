"""Untrained factors as methods: SVD, ASVD and PCA at any density."""

from __future__ import annotations

from transformers import PreTrainedModel

from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.methods.method import Method, compressed

TITLES = {"svd": "SVD", "asvd": "ASVD", "pca": "PCA", "weighted-pca": "weighted PCA"}


def untrained(
    model: PreTrainedModel, init: str, density: float, statistics: Statistics | None, window: int, group: int
) -> Method:
    """Factors made now.

    Args:
        model: the bare model.
        init: one of `TITLES`.
        density: share of the key and of the value channels kept.
        statistics: of the model; not needed for "svd".
        window, group: as in `CSKVConfig`.

    Raises:
        CSKVError: a setting is out of range, or statistics are missing or of another model.
    """
    config = CSKVConfig(density, density, init=init, window=window, group=group)
    return compressed(initialise(model, config, statistics), TITLES[init], density)

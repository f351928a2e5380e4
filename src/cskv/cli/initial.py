"""Untrained factors for the commands that need them, from saved statistics where the initialisation takes some."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cskv.config import CSKVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.adapter import CSKVAdapter


def initial_adapter(model: PreTrainedModel, config: CSKVConfig, statistics: Path) -> CSKVAdapter:
    """Factorise a model.

    Args:
        model: the base model.
        config: the settings.
        statistics: the file that `cskv calibrate` wrote; not read for SVD.

    Raises:
        DataError: there are no usable statistics, or they lack something (`--covariance`).
        AdapterError: the statistics belong to another model.
    """
    from cskv.initialisation import initialise
    from cskv.statistics import Statistics

    return initialise(model, config, None if config.init == "svd" else Statistics.load(statistics))

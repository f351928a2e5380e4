"""Untrained factors for the commands that need them, from saved statistics where the initialisation takes some."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cskv.cli.common import progress, say
from cskv.config import CSKVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.adapter import CSKVAdapter
    from cskv.data.samples import TokenSamples

ALLOCATION_SAMPLES = 8


def initial_adapter(model: PreTrainedModel, config: CSKVConfig, statistics: Path) -> CSKVAdapter:
    """Factorise a model.

    Args:
        model: the base model.
        config: the settings.
        statistics: the file that `cskv calibrate` wrote; not read for SVD.

    Raises:
        DataError: there are no usable statistics, or they lack something (made with `--no-covariance`).
        AdapterError: the statistics belong to another model.
    """
    from cskv.initialisation import initialise
    from cskv.statistics import Statistics

    return initialise(model, config, None if config.init == "svd" else Statistics.load(statistics))


def allocated_adapter(
    model: PreTrainedModel, config: CSKVConfig, statistics: Path, samples: TokenSamples, target_ratio: float
) -> CSKVAdapter:
    """Factorise a model with ranks, or ranks and widths, from one budget, dealt out by measured sensitivity.

    Args:
        model: the base model.
        config: the settings; a PCA init.
        statistics: the file that `cskv calibrate` wrote.
        samples: text to measure on; a few samples of it are used.
        target_ratio: share of all key and value channels kept, or of the bytes with mixed widths.

    Raises:
        ConfigError: the init is not PCA, or the ratio too small.
        DataError: there are no usable statistics, or too little text.
    """
    from cskv.allocation import allocate_ranks
    from cskv.statistics import Statistics
    from cskv.widths import WidthChoice, allocate_widths

    allocate, kind = (allocate_widths, "mixed") if config.mixed_widths else (allocate_ranks, "allocated")
    taken = list(islice(samples, ALLOCATION_SAMPLES))
    with progress() as bar:
        task = bar.add_task("measuring sensitivity", total=None)
        found = allocate(
            model,
            config,
            Statistics.load(statistics),
            taken,
            target_ratio,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    what = "widths" if config.mixed_widths else "ranks"
    other_kl = found.mixed_kl if isinstance(found, WidthChoice) else found.allocated_kl
    say(
        f"KL to the uncompressed model on text kept aside: {found.uniform_kl:.4g} nats per token with uniform {what}, "
        f"{other_kl:.4g} with {kind} ones; {'uniform' if found.is_uniform else kind} {what} are kept"
    )
    found.adapter.metrics |= {"uniform_kl": found.uniform_kl, f"{kind}_kl": other_kl}
    return found.adapter

"""Untrained factors for the commands that need them, from saved statistics where the initialisation takes some."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cskv.cli.common import progress, say
from cskv.config import CSKVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.adapter.adapter import CSKVAdapter
    from cskv.data.samples import TokenSamples

ALLOCATION_SAMPLES = 8


def initial_adapter(model: PreTrainedModel, config: CSKVConfig, statistics: Path) -> CSKVAdapter:
    """Factorise a model, by the statistics that `cskv calibrate` wrote, which SVD does not read.

    Raises:
        DataError: there are no usable statistics, or they lack something (made with `--no-covariance`).
        AdapterError: the statistics belong to another model.
    """
    from cskv.calibration.statistics import Statistics
    from cskv.compression.initialise import initialise

    return initialise(model, config, None if config.init == "svd" else Statistics.load(statistics))


def requantised_adapter(
    model: PreTrainedModel, adapter: CSKVAdapter, config: CSKVConfig, statistics: Path
) -> CSKVAdapter:
    """Return the factors of an adapter of 16-bit latents for the bits, blocks and window of other settings.

    Latents are centred by the statistics that `cskv calibrate` wrote; without the file they keep their mean, which is
    said.

    Raises:
        AdapterError: the adapter or the statistics belong to another model.
        ConfigError: its latents are in few bits already.
    """
    from cskv.calibration.statistics import Statistics
    from cskv.compression.initialise import in_few_bits
    from cskv.models.survey import survey

    base = survey(model)
    adapter.check_fits(base)
    found = Statistics.load(statistics) if statistics.exists() else None
    if found is None:
        say(f"note: no calibration statistics at {statistics}, so latents are not centred")
    else:
        found.check_fits(base)
    return in_few_bits(adapter, config, found)


def allocated_adapter(
    model: PreTrainedModel, config: CSKVConfig, statistics: Path, samples: TokenSamples, target_ratio: float
) -> CSKVAdapter:
    """Factorise a model with ranks, or ranks and widths, from one budget, dealt out by sensitivity on a few samples.

    The budget is a share of all key and value channels, or with mixed widths of the bytes of a 16-bit cache.

    Raises:
        ConfigError: the init is not PCA, or the ratio too small.
        DataError: there are no usable statistics, or too little text.
    """
    from cskv.calibration.statistics import Statistics
    from cskv.compression.budget import allocate_ranks, allocate_widths

    allocate, kind = (allocate_widths, "mixed") if config.mixed_widths else (allocate_ranks, "allocated")
    taken = list(islice(samples, ALLOCATION_SAMPLES))
    known = Statistics.load(statistics)
    with progress() as bar:
        task = bar.add_task("measuring sensitivity", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        found = allocate(model, config, known, taken, target_ratio, progress=report)
    what = "widths" if config.mixed_widths else "ranks"
    kls = {"uniform": found.uniform_kl, kind: found.allocated_kl}
    told = ", ".join(f"{value:.4g} with {name} {what}" for name, value in kls.items() if value is not None)
    kept = "uniform" if found.is_uniform else kind
    say(f"KL to the uncompressed model on text kept aside, in nats per token: {told}; {kept} {what} are kept")
    found.adapter.metrics |= {f"{name}_kl": value for name, value in kls.items() if value is not None}
    return found.adapter

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
    from cskv.compression.budget import Budget
    from cskv.data.samples import TokenSamples

BUDGET_SAMPLES = 12  # half of them to choose widths by, half to measure on


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
    model: PreTrainedModel,
    config: CSKVConfig,
    statistics: Path,
    samples: TokenSamples,
    budget: Budget,
    *,
    ranks_only: bool = False,
) -> CSKVAdapter:
    """Factorise a model with ranks and widths from one budget; what it loses is measured on a few samples.

    Raises:
        ConfigError: the init is not the Fisher one, or the budget too small.
        DataError: there are no usable statistics, or too little text.
    """
    from cskv.calibration.statistics import Statistics
    from cskv.compression.budget import allocate

    taken = list(islice(samples, BUDGET_SAMPLES))
    known = Statistics.load(statistics)
    with progress() as bar:
        task = bar.add_task("factorising", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        found = allocate(model, config, known, taken, budget, ranks_only=ranks_only, progress=report)
    say(
        f"{found.ratio:.2%} of the bytes; KL to the uncompressed model, in nats per token: predicted "
        f"{found.predicted_kl:.4g}, measured on text kept aside {found.measured_kl:.4g}"
    )
    found.adapter.metrics |= {
        "ratio": found.ratio,
        "predicted_kl": found.predicted_kl,
        "measured_kl": found.measured_kl,
        "budget": {name: value for name, value in vars(budget).items() if value is not None},
    }
    return found.adapter

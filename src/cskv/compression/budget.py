"""Ranks and widths from one budget: which latents are kept, and in how many bits each.

Every projection is factorised once, at full rank, in the basis in which an error of a latent is nats of the model's
predictions wherever it is (`cskv.factorization.weighting`). What each latent loses is noted: its eigenvalue where it is
dropped, the measured error of its grid where it is kept in few bits, nothing at 16 bits. The widths of least total loss
within the budget are taken over all layers, keys and values at once (`cskv.quantization.widths`). All adapters are
slices of the same full-rank factors, and no projection is measured by a forward of its own.

To second order the losses would add up to the KL divergence. Errors of real budgets are larger than that, and a model
that is sure of a token has no gradient there, so losses decide what is kept, and the divergence itself is measured: on
the samples that widths were chosen by, to find a budget that costs no more than so much, and on others, to say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.statistics import Statistics
from cskv.compression.losses import LossTable, OnProgress
from cskv.config import CSKVConfig, is_number
from cskv.errors import ConfigError, DataError
from cskv.models.survey import survey
from cskv.reading.divergence import Divergence

SEARCH_ROUNDS = 8  # of finding the ratio of a divergence
CLOSE_ENOUGH = 0.95  # of the divergence that is allowed
SHRINKAGES = (0.0, 0.3)  # of Fisher information, both tried: the longer the text, and the fewer the channels, the less
USUAL_RATIO = 0.1  # at which they are compared where the ratio is to be found


@dataclass(frozen=True)
class Budget:
    """A limit on a cache, in one of three forms.

    Attributes:
        ratio: bytes of sealed tokens as a share of those of a 16-bit cache, in (0, 1].
        bytes_per_token: the same bytes, over all layers.
        max_kl: nats per token that the predictions may lose: the smallest cache that is predicted to lose no more.

    Raises:
        ConfigError: not one of them is given, or it is out of range.
    """

    ratio: float | None = None
    bytes_per_token: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"a budget is a ratio, bytes per token or a largest KL; got {given or 'none'}: give one")
        ((name, value),) = given.items()
        if not is_number(value) or value <= 0 or (name == "ratio" and value > 1):
            expected = "a share of the uncompressed bytes in (0, 1]" if name == "ratio" else "a number above 0"
            raise ConfigError(f"{name} is {value!r}; expected {expected}")

    def ratio_of(self, uncompressed_bytes: float) -> float:
        """Return the ratio that it allows, or the usual one where that is to be found."""
        if self.bytes_per_token is not None:
            return min(1.0, self.bytes_per_token / uncompressed_bytes)
        return USUAL_RATIO if self.ratio is None else self.ratio


@dataclass(frozen=True)
class Allocation:
    """The result of spending a budget.

    Attributes:
        adapter: ranks and widths as chosen.
        ratio: the bytes of its sealed tokens as a share of those of a 16-bit cache.
        predicted_kl: nats per token on the samples that it was chosen by.
        measured_kl: nats per token on the samples kept aside.
    """

    adapter: CSKVAdapter
    ratio: float
    predicted_kl: float
    measured_kl: float


def allocate(
    model: nn.Module,
    config: CSKVConfig,
    statistics: Statistics,
    samples: Sequence[Int[Tensor, " tokens"]],
    budget: Budget,
    *,
    ranks_only: bool = False,
    progress: OnProgress | None = None,
) -> Allocation:
    """Choose ranks and widths, and factorise with them.

    The bytes are those of sealed tokens: codes, minima and scales. Sinks, the window, positions and slack come on top.

    Args:
        model: the base model, with its language-model head.
        config: init "fisher-pca"; its densities and bits are replaced.
        statistics: of the model, with Fisher information.
        samples: token samples without padding, at least two; the second half is kept aside to measure on.
        budget: to spend.
        ranks_only: keep all latents in 16 bits. So are commuting keys and latents of head groups in any case.
        progress: called with (stage, done, in all).

    Raises:
        ConfigError: the settings have another init or widths of their own, or the budget is too small.
        DataError: fewer than two samples, one too short to have old tokens, or statistics without Fisher information.
    """
    given = model, config, statistics, samples, [budget]
    (found,) = allocate_each(*given, ranks_only=ranks_only, progress=progress)
    return found


@torch.no_grad()
def allocate_each(
    model: nn.Module,
    config: CSKVConfig,
    statistics: Statistics,
    samples: Sequence[Int[Tensor, " tokens"]],
    budgets: Sequence[Budget],
    *,
    ranks_only: bool = False,
    progress: OnProgress | None = None,
) -> list[Allocation]:
    """Spend several budgets on their own, as `allocate` does with one; what latents lose is measured once for all.

    Raises:
        ConfigError, DataError: as for `allocate`.
    """
    _check(config, samples)
    middle = (len(samples) + 1) // 2  # whole halves, since sources may alternate between kinds of text
    seen, aside = samples[:middle], samples[middle:]
    say = progress or (lambda stage, done, total: None)
    surveyed = survey(model)
    divergence = Divergence(surveyed)
    exact, exact_aside = divergence.exact(seen), divergence.exact(aside)

    def kl(adapter: CSKVAdapter) -> float:
        return divergence.mean(adapter, seen, exact=exact)

    tables = [LossTable(surveyed, config, statistics, ranks_only, shrinkage) for shrinkage in SHRINKAGES]
    for table in tables:
        table.measure(seen, say)

    def spend(budget: Budget) -> Allocation:
        found = []
        for table in tables:
            adapter = table.adapter(budget.ratio_of(table.uncompressed_bytes))
            found.append((kl(adapter), table, adapter))
        predicted, table, adapter = min(found, key=lambda one: one[0])
        if budget.max_kl is not None:
            adapter, predicted = _smallest(table, kl, budget.max_kl, say)
        say("measuring the divergence", 0, 1)
        measured = divergence.mean(adapter, aside, exact=exact_aside)
        say("measuring the divergence", 1, 1)
        return Allocation(adapter, ratio_of(adapter), predicted, measured)

    return [spend(budget) for budget in budgets]


def _smallest(
    table: LossTable, kl: Callable[[CSKVAdapter], float], limit: float, say: OnProgress
) -> tuple[CSKVAdapter, float]:
    """Find the smallest adapter that diverges by no more than the limit, by bisection of the ratio's logarithm."""
    low, high = math.log(table.least_ratio), 0.0
    best = table.adapter(1.0)
    least = kl(best)
    if least > limit:
        raise ConfigError(f"even all latents at full width diverge by {least:.3g} nats per token; allow more")
    for done in range(SEARCH_ROUNDS):
        say("searching the ratio", done, SEARCH_ROUNDS)
        middle = (low + high) / 2
        try:
            tried = table.adapter(math.exp(middle))
        except ConfigError:  # too small for a latent of every projection
            low = middle
            continue
        if (found := kl(tried)) > limit:
            low = middle
            continue
        best, least, high = tried, found, middle
        if found >= CLOSE_ENOUGH * limit:
            break
    return best, least


def bytes_per_token(adapter: CSKVAdapter, dtype: torch.dtype) -> tuple[int, float]:
    """Count the bytes of a token over all layers: uncompressed keys and values, and sealed latents.

    Codes, minima and scales of full blocks count; the window, positions and slack come on top.

    Args:
        adapter: any.
        dtype: of keys, values and latents that are not packed.
    """
    uncompressed, compressed = 0, 0.0
    for index in adapter.layer_indices:
        pair = adapter.factors(index)
        for part, grid in zip((pair.k, pair.v), adapter.grids(index), strict=True):
            uncompressed += part.kv_dim * dtype.itemsize
            compressed += part.rank * (dtype.itemsize if grid is None else grid.bits_per_latent / 8)
    return uncompressed, compressed


def ratio_of(adapter: CSKVAdapter) -> float:
    """Return the bytes of a sealed token's latents as a share of its keys and values in 16 bits."""
    uncompressed, compressed = bytes_per_token(adapter, torch.bfloat16)
    return compressed / uncompressed


def _check(config: CSKVConfig, samples: Sequence[Tensor]) -> None:
    if config.init != "fisher-pca":
        raise ConfigError(
            f"a budget is spent by what errors cost the predictions, init is {config.init!r}; expected 'fisher-pca'"
        )
    if config.is_quantised:
        raise ConfigError(
            f"a budget chooses the widths of latents; got k_bits {config.k_bits}, v_bits {config.v_bits} and "
            f"mixed_widths {config.mixed_widths}: give one of them"
        )
    if len(samples) < 2:
        raise DataError(f"spending a budget needs at least 2 samples, got {len(samples)}; give more text")
    least = config.sinks + config.window + config.group + 1  # or nothing would ever be read from latents, nor lost
    if (shortest := min(map(len, samples))) < least:
        raise DataError(
            f"a sample of {shortest} tokens has none that would be read from latents; give samples of at least {least} "
            "tokens, or a smaller window"
        )

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import Teacher
from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import Factorisation, Part
from cskv.config import CSKVConfig, is_number
from cskv.errors import ConfigError, DataError
from cskv.factorization.basis import ordered
from cskv.factorization.factors import Factors, LayerFactors
from cskv.factorization.weighting import shrunk
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.survey import Survey, survey
from cskv.quantization.grid import Grid
from cskv.quantization.widths import CHOICES, RANKS, Losses, choose_widths, runs_of, width_errors
from cskv.reading.divergence import Divergence

BITS_16 = 16  # of a key or value channel of the uncompressed cache
ROUNDS = 12  # of finding the bits at which codes that do not fill their last byte take no more than the ratio
SEARCH_ROUNDS = 8  # of finding the ratio of a divergence
CLOSE_ENOUGH = 0.95  # of the divergence that is allowed
SHRINKAGES = (0.0, 0.3)  # of Fisher information, both tried: the longer the text, and the fewer the channels, the less
USUAL_RATIO = 0.1  # at which they are compared where the ratio is to be found
OnProgress = Callable[[str, int, int], None]  # (stage, done, in all)


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


@torch.no_grad()
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
    _check(config, samples)
    middle = (len(samples) + 1) // 2  # whole halves, since sources may alternate between kinds of text
    seen, aside = samples[:middle], samples[middle:]
    say = progress or (lambda stage, done, total: None)
    surveyed = survey(model)
    divergence = Divergence(surveyed)
    exact = divergence.exact(seen)

    def kl(adapter: CSKVAdapter) -> float:
        return divergence.mean(adapter, seen, exact=exact)

    found = []
    for shrinkage in SHRINKAGES:
        table = _Table(surveyed, config, statistics, ranks_only, shrinkage)
        table.measure(seen, say)
        adapter = table.adapter(budget.ratio_of(table.uncompressed_bytes))
        found.append((kl(adapter), table, adapter))
    predicted, table, adapter = min(found, key=lambda one: one[0])
    if budget.max_kl is not None:
        adapter, predicted = _smallest(table, kl, budget.max_kl, say)
    say("measuring the divergence", 0, 1)
    measured = divergence.mean(adapter, aside)
    return Allocation(adapter, ratio_of(adapter), predicted, measured)


def _smallest(
    table: _Table, kl: Callable[[CSKVAdapter], float], limit: float, say: OnProgress
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


class _Table:
    """What every latent of every projection loses at every width, and the adapters that follow from it.

    Args:
        surveyed: the base model.
        config, statistics, ranks_only: as for `allocate`.
        shrinkage: of Fisher information towards its diagonal.
    """

    def __init__(
        self, surveyed: Survey, config: CSKVConfig, statistics: Statistics, ranks_only: bool, shrinkage: float
    ) -> None:
        self.surveyed, self._statistics, self._shrinkage = surveyed, statistics, shrinkage
        plain = replace(config, k_density=1.0, v_density=1.0)
        self._config = replace(plain, mixed_widths=True)
        self._components = Factorisation(surveyed, plain, statistics, shrinkage).components()
        grouped = config.head_groups > 1
        self._plain = {
            part
            for part in self._components
            if ranks_only or grouped or (part[1] == "k" and config.key_factors == "commuting")
        }
        self._losses = {part: self._of_ranks(part) for part in self._components}

    @cached_property
    def uncompressed_bytes(self) -> float:
        """Bytes of a token's keys and values in 16 bits, over all layers."""
        return sum(own.factors.kv_dim for own in self._components.values()) * BITS_16 / 8

    @cached_property
    def least_ratio(self) -> float:
        """The least ratio that keeps a latent of every projection."""
        bits = sum(own.step * float(own.costs()[1]) for own in self._losses.values())
        return min(1.0, 1.05 * bits / (8 * self.uncompressed_bytes))

    def measure(self, samples: Sequence[Int[Tensor, " tokens"]], say: OnProgress) -> None:
        """Measure the errors of latents in few bits."""
        factors = {part: own.factors for part, own in self._components.items() if part not in self._plain}
        if not factors:
            return
        errors: dict[Part, Tensor] = {}
        sinks, stage = self._config.sinks, "measuring widths"
        for done, (part, latents) in enumerate(observe_latents(self.surveyed, factors, samples)):
            own = width_errors(latents[:, sinks:], self._config.block(part[1])).cpu() / len(samples)
            errors[part] = errors[part] + own if part in errors else own
            say(stage, done + 1, len(factors) * len(samples))
        for part, table in errors.items():
            weighted = self._noise_weights(part)[:, None] * table
            weighted[:, 0] = self._components[part].spectrum
            self._losses[part] = Losses(weighted, CHOICES, self._config.block(part[1]))

    def adapter(self, ratio: float) -> CSKVAdapter:
        """Make the adapter of least loss whose bytes are within the ratio.

        Raises:
            ConfigError: the ratio keeps no latent of some projection.
        """
        limit = ratio * 8 * self.uncompressed_bytes
        low, high, kept = 0.0, 2 * limit, None
        for _ in range(ROUNDS):  # codes that do not fill their last byte take more than their bits
            bits = (low + high) / 2
            try:
                tried = choose_widths(self._losses, bits)
            except ConfigError:
                low = bits
                continue
            if sum(self._bits(part, widths) for part, widths in tried.items()) <= limit:
                kept, low = tried, bits
            else:
                high = bits
        if kept is None:
            raise ConfigError(f"no choice of widths takes {ratio:.3g} of the bytes; raise the budget")
        return self._cut(self._promoted(kept, limit))

    def _promoted(self, widths: Mapping[Part, Tensor], limit: float) -> dict[Part, Tensor]:
        """Spend what is left where all is as wide as grids go: whole projections in 16 bits, since grids end at 8."""
        found = dict(widths)
        left = limit - sum(self._bits(part, own) for part, own in found.items())
        packed = [part for part in found if part not in self._plain and int(found[part].min()) == max(CHOICES)]
        for part in sorted(packed, key=lambda part: self._losses[part].of(found[part]), reverse=True):
            wide = torch.full_like(found[part], BITS_16)
            more = self._bits(part, wide) - self._bits(part, found[part])
            if more <= left:
                found[part], left = wide, left - more
        return found

    def _cut(self, widths: Mapping[Part, Tensor]) -> CSKVAdapter:
        """Cut factors of these widths out of the full-rank ones."""
        cut, runs = {}, {}
        for part, own in widths.items():
            components = self._components[part]
            if part in self._plain or int(own.max()) == BITS_16:
                cut[part] = components.truncated(int(own.count_nonzero())).clone()
                continue
            kept, runs[part] = runs_of(own)
            cut[part] = ordered(components.factors, kept.to(components.factors.down.device)).clone()
        layers = {index: LayerFactors(cut[index, "k"], cut[index, "v"]) for index, kind in cut if kind == "k"}
        k_density, v_density = (
            sum(getattr(own, kind).rank for own in layers.values())
            / sum(getattr(own, kind).kv_dim for own in layers.values())
            for kind in ("k", "v")
        )
        config = replace(self._config, k_density=k_density, v_density=v_density, mixed_widths=bool(runs))
        return CSKVAdapter(config, layers, self.surveyed.base, widths=runs)

    def _of_ranks(self, part: Part) -> Losses:
        """Return the losses of a projection whose latents are dropped or stay in 16 bits."""
        spectrum = self._components[part].spectrum
        commuting = part[1] == "k" and self._config.key_factors == "commuting"
        step = 2 if commuting else self._config.head_groups
        return Losses(torch.stack([spectrum, torch.zeros_like(spectrum)], 1), RANKS, step=step)

    def _noise_weights(self, part: Part) -> Float[Tensor, " rank"]:
        """Return the nats per token of a unit of squared error in each latent, where tokens err independently."""
        up = self._components[part].factors.up.double().cpu()
        fisher = shrunk(self._statistics.get(part[0], f"{part[1]}.fisher"), self._shrinkage)
        return torch.einsum("cr,cd,dr->r", up, fisher, up) / 2

    def _bits(self, part: Part, widths: Tensor) -> float:
        """Count the bits per token of a projection's latents as they are stored."""
        if part in self._plain or int(widths.max()) == BITS_16:
            return float(BITS_16 * widths.count_nonzero())
        grid = Grid(runs_of(widths)[1], *self._config.block(part[1]))
        return grid.rank * grid.bits_per_latent


def observe_latents(
    surveyed: Survey, factors: Mapping[Part, Factors], samples: Sequence[Int[Tensor, " tokens"]]
) -> Iterator[tuple[Part, Float[Tensor, "1 tokens rank"]]]:
    """Yield the latents of keys and values, one sample and one projection at a time, in fp32.

    Args:
        surveyed: the base model, nothing attached.
        factors: of the projections to observe, which read the layer's input.
        samples: token ids without padding.
    """
    teacher = Teacher(surveyed.model, surveyed.sites)
    with torch.no_grad(), evaluation_mode(surveyed.model), teacher.watching():
        for sample in samples:
            seen = teacher.observe(sample[None])
            for part, own in factors.items():
                x = seen[part[0]].x
                yield part, own.to(x.device, torch.float32).latents(x.float())


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

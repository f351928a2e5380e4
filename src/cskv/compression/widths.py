"""Ranks and widths together, from one budget of bytes: which latents are kept, and in how many bits each.

Full-rank PCA latents of real text are put on the grid at every width, and the error of every channel is noted. Errors
of all projections are brought into one unit by measured sensitivity (`sensitivity`), and the widths of least total
error within the budget are taken; a width of 0 drops the latent (`cskv.quantization.widths`). The result is compared
with 4 bits throughout, at the rank that takes the same bytes, on samples that were not used, and the better is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.adapter.folder import Widths
from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import initialise
from cskv.compression.observation import observe_latents
from cskv.compression.reading import Part
from cskv.compression.sensitivity import Allocation, Progress, deal, halves
from cskv.config import CSKVConfig
from cskv.errors import ConfigError
from cskv.factorization.basis import centred, ordered
from cskv.factorization.factors import LayerFactors
from cskv.models.sites import find_sites
from cskv.quantization.grid import Grid
from cskv.quantization.widths import CHOICES, choose_widths, runs_of, width_errors

UNIFORM_BITS = 4  # what mixed widths are compared with
BITS_16 = 16  # of a key or value channel of the uncompressed cache
ROUNDS = 12  # of finding the budget at which codes that do not fill their last byte take no more than the ratio


def allocate_widths(
    model: nn.Module,
    config: CSKVConfig,
    statistics: Statistics,
    samples: Sequence[Int[Tensor, " tokens"]],
    target_ratio: float,
    progress: Progress | None = None,
) -> Allocation:
    """Choose ranks and widths for a cache of `target_ratio` of the bytes of a 16-bit one, and factorise with them.

    The ratio is that of sealed tokens, codes, minima and scales. The window, positions and slack come on top.

    Args:
        model: the base model, with its language-model head.
        config: a PCA init with `mixed_widths`, joint key factors and one head group; its densities are replaced.
        statistics: of the model, with covariances.
        samples: token samples without padding, at least two; the second half is kept aside for the comparison.
        target_ratio: in (0, 1).
        progress: called with (projections measured, projections in all).

    Raises:
        ConfigError: the settings do not go with mixed widths, or the ratio is out of range.
        DataError: fewer than two samples.
    """
    _check(config, target_ratio)
    full = _full(model, config, statistics)
    errors = _errors(model, full, config, halves(samples)[0])
    uniform = _uniform(model, config, statistics, target_ratio)
    losses = {part: _uniform_loss(table, uniform, part) for part, table in errors.items()}

    def make(weights: Mapping[Part, float]) -> CSKVAdapter:
        return _mixed(full, config, {part: weights[part] * table for part, table in errors.items()}, target_ratio)

    fits = ratio_of(uniform) <= target_ratio
    return deal(model, uniform, losses, make, samples, uniform_fits=fits, progress=progress)


def _full(model: nn.Module, config: CSKVConfig, statistics: Statistics) -> CSKVAdapter:
    """Full-rank factors with centred latents, not quantised."""
    plain = replace(config, k_density=1.0, v_density=1.0, mixed_widths=False, k_bits=16, v_bits=16)
    adapter = initialise(model, plain, statistics)
    layers = {}
    for i in adapter.layer_indices:
        mean, pair = statistics.get(i, "input.mean"), adapter.factors(i)
        own = [centred(factors.clone(), factors.down.detach() @ mean.to(factors.down)) for factors in (pair.k, pair.v)]
        layers[i] = LayerFactors(*own)
    return CSKVAdapter(plain, layers, adapter.base)


def ratio_of(adapter: CSKVAdapter) -> float:
    """Codes, minima and scales of a sealed token as a share of its 16-bit keys and values, full blocks assumed."""
    bits = full = 0.0
    for index in adapter.layer_indices:
        factors = adapter.factors(index)
        for own, grid in zip((factors.k, factors.v), adapter.grids(index), strict=True):
            bits += own.rank * (BITS_16 if grid is None else grid.bits_per_latent)
            full += own.kv_dim * BITS_16
    return bits / full


def _check(config: CSKVConfig, target_ratio: float) -> None:
    if not config.mixed_widths or "pca" not in config.init:
        raise ConfigError(f"widths are chosen for PCA latents, init is {config.init!r}; give 'pca' or 'weighted-pca'")
    if config.key_factors != "joint" or config.head_groups > 1:
        raise ConfigError(
            f"mixed widths are for joint factors of one head group, got {config.key_factors} keys and "
            f"{config.head_groups} head groups; give --k-bits and --v-bits instead"
        )
    if not 0 < target_ratio < 1:
        raise ConfigError(f"target_ratio is {target_ratio!r}; expected a share of the uncompressed bytes in (0, 1)")


def _errors(model: nn.Module, full: CSKVAdapter, config: CSKVConfig, samples: Sequence[Tensor]) -> dict[Part, Tensor]:
    """Mean squared error of every full-rank latent at every width: (rank, choices), fp64."""
    tables: dict[Part, Tensor] = {}
    for part, latents in observe_latents(model, full, samples):
        table = width_errors(latents, config.block(part[1])).cpu() / len(samples)
        tables[part] = tables[part] + table if part in tables else table
    return tables


def _uniform(model: nn.Module, config: CSKVConfig, statistics: Statistics, target_ratio: float) -> CSKVAdapter:
    """4 bits throughout, in KIVI's blocks, at the largest ranks within the ratio, or the least that there is."""
    plain = replace(config, mixed_widths=False, k_bits=UNIFORM_BITS, v_bits=UNIFORM_BITS, k_block=None, v_block=None)
    ranks = {}
    for site in find_sites(model):
        budget = target_ratio * BITS_16 * site.kv_dim
        pair = [_largest_rank(site.kv_dim, budget, plain.block(kind)) for kind in ("k", "v")]
        ranks[site.layer_idx] = (pair[0], pair[1])
    kv_dim = find_sites(model)[0].kv_dim
    k_rank, v_rank = next(iter(ranks.values()))
    plain = replace(plain, k_density=k_rank / kv_dim, v_density=v_rank / kv_dim)
    return initialise(model, plain, statistics, ranks)


def _largest_rank(kv_dim: int, budget: float, block: tuple[int, int]) -> int:
    fitting = [
        rank
        for rank in range(1, kv_dim + 1)
        if rank * Grid.uniform(rank, UNIFORM_BITS, block).bits_per_latent <= budget
    ]
    return max(fitting, default=1)


def _uniform_loss(errors: Tensor, uniform: CSKVAdapter, part: Part) -> float:
    """What the uniform adapter loses of one projection, from the errors of its latents."""
    rank = getattr(uniform.factors(part[0]), part[1]).rank
    return float(errors[:rank, CHOICES.index(UNIFORM_BITS)].sum() + errors[rank:, 0].sum())


def _mixed(full: CSKVAdapter, config: CSKVConfig, errors: Mapping[Part, Tensor], target_ratio: float) -> CSKVAdapter:
    """The adapter of least error whose real bytes are within the ratio."""
    blocks = {part: config.block(part[1]) for part in errors}
    limit = target_ratio * BITS_16 * sum(len(table) for table in errors.values())
    low, high, kept = 0.0, 2 * limit, None
    for _ in range(ROUNDS):  # codes that do not fill their last byte take more than their bits
        budget = (low + high) / 2
        try:
            tried = {part: runs_of(widths) for part, widths in choose_widths(errors, blocks, budget).items()}
        except ConfigError:
            low = budget
            continue
        grids = (Grid(runs, *blocks[part]) for part, (_, runs) in tried.items())
        if sum(grid.rank * grid.bits_per_latent for grid in grids) <= limit:
            kept, low = tried, budget
        else:
            high = budget
    if kept is None:
        raise ConfigError(f"no choice of widths takes {target_ratio:g} of the bytes; raise the target ratio")
    return _adapter(full, config, kept)


def _adapter(full: CSKVAdapter, config: CSKVConfig, kept: Mapping[Part, tuple[Tensor, Widths]]) -> CSKVAdapter:
    parts = {
        (index, kind): ordered(getattr(full.factors(index), kind), kept[index, kind][0]).clone() for index, kind in kept
    }
    layers = {index: LayerFactors(parts[index, "k"], parts[index, "v"]) for index in full.layer_indices}
    k_density, v_density = (
        sum(parts[i, kind].rank for i in layers) / sum(parts[i, kind].kv_dim for i in layers) for kind in ("k", "v")
    )
    widths = {part: runs for part, (_, runs) in kept.items()}
    return CSKVAdapter(replace(config, k_density=k_density, v_density=v_density), layers, full.base, widths=widths)

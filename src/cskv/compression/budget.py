"""Ranks and widths from one budget: which latents are kept, and in how many bits each.

Every projection is factorised once, at full rank, and what each latent loses at each width is noted: its eigenvalue at
0 bits and nothing at 16, or, for latents in few bits, the error on real text as the grid stores it. Losses of all
projections are brought into one unit by measured sensitivity (`sensitivity`), and the widths of least total loss within
the budget are taken; a width of 0 drops the latent (`cskv.quantization.widths`). All adapters that are tried are slices
of the same full-rank factors. The result is compared with uniform ranks, or with 4 bits throughout at the rank that
takes the same bytes, on samples that were not used, and the better is kept: losses of different projections interact,
so that the sum of them can mislead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import Teacher
from cskv.calibration.statistics import Statistics
from cskv.compression.divergence import Divergence
from cskv.compression.initialise import Factorisation
from cskv.compression.reading import Part
from cskv.compression.sensitivity import Allocation, OnMeasured, deal, halves
from cskv.config import CSKVConfig
from cskv.errors import ConfigError
from cskv.factorization.basis import ordered
from cskv.factorization.components import Components
from cskv.factorization.factors import Factors, LayerFactors
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.survey import Survey, survey
from cskv.quantization.grid import Grid
from cskv.quantization.widths import CHOICES, RANKS, choose_widths, runs_of, width_errors

UNIFORM_BITS = 4  # what mixed widths are compared with
BITS_16 = 16  # of a key or value channel of the uncompressed cache
ROUNDS = 12  # of finding the budget at which codes that do not fill their last byte take no more than the ratio


def allocate_ranks(
    model: nn.Module,
    config: CSKVConfig,
    statistics: Statistics,
    samples: Sequence[Int[Tensor, " tokens"]],
    target_ratio: float,
    progress: OnMeasured | None = None,
) -> Allocation:
    """Choose the ranks for a cache of `target_ratio` of the uncompressed channels, and factorise with them.

    Args:
        model: the base model, with its language-model head.
        config: a PCA init; its densities are replaced.
        statistics: of the model, with covariances.
        samples: token samples without padding, at least two; the second half is kept aside for the comparison.
        target_ratio: latents kept as a share of all key and value channels, in (0, 1].
        progress: called with (projections measured, projections in all).

    Raises:
        ConfigError: the init is not PCA, or the ratio is out of range.
        DataError: fewer than two samples.
    """
    if "pca" not in config.init:
        raise ConfigError(
            f"ranks are allocated by eigenvalues, init is {config.init!r}; expected 'pca' or 'weighted-pca'"
        )
    halves(samples)
    surveyed = survey(model)
    config = replace(config, k_density=target_ratio, v_density=target_ratio)
    divergence, factorisation = Divergence(surveyed), Factorisation(surveyed, config, statistics)
    components = factorisation.components()
    uniform = factorisation.adapter(components=components)
    tables = {part: torch.stack([own.spectrum, torch.zeros_like(own.spectrum)], 1) for part, own in components.items()}
    budget = float(BITS_16 * int(target_ratio * sum(map(len, tables.values())) + 0.5))
    step = 2 if config.key_factors == "commuting" else config.head_groups

    def make(weights: Mapping[Part, float]) -> CSKVAdapter:
        weighted = {part: weights[part] * table for part, table in tables.items()}
        widths = choose_widths(weighted, dict.fromkeys(tables, (1, 1)), budget, RANKS, step)
        ranks = {part: int(kept.count_nonzero()) for part, kept in widths.items()}
        return factorisation.adapter({i: (ranks[i, "k"], ranks[i, "v"]) for i in uniform.layer_indices}, components)

    return deal(divergence, uniform, _losses(tables, uniform, RANKS.index(16)), make, samples, progress=progress)


def allocate_widths(
    model: nn.Module,
    config: CSKVConfig,
    statistics: Statistics,
    samples: Sequence[Int[Tensor, " tokens"]],
    target_ratio: float,
    progress: OnMeasured | None = None,
) -> Allocation:
    """Choose ranks and widths for a cache of `target_ratio` of the bytes of a 16-bit one, and factorise with them.

    The ratio is that of sealed tokens, codes, minima and scales. The window, positions and slack come on top.

    Args:
        config: a PCA init with `mixed_widths`, joint key factors and one head group; its densities are replaced.
        target_ratio: in (0, 1).
        model, statistics, samples, progress: as for `allocate_ranks`.

    Raises:
        ConfigError: the settings do not go with mixed widths, or the ratio is out of range.
        DataError: fewer than two samples.
    """
    _check_mixed(config, target_ratio)
    seen, _ = halves(samples)
    surveyed = survey(model)
    divergence = Divergence(surveyed)
    plain = replace(config, k_density=1.0, v_density=1.0, mixed_widths=False)
    components = Factorisation(surveyed, plain, statistics).components()
    full = CSKVAdapter(plain, _layers({part: own.factors for part, own in components.items()}), surveyed.base)
    errors = _errors(surveyed, full, config, seen)
    uniform = _uniform(surveyed, config, statistics, components, target_ratio)
    losses = _losses(errors, uniform, CHOICES.index(UNIFORM_BITS))

    def make(weights: Mapping[Part, float]) -> CSKVAdapter:
        return _mixed(full, config, {part: weights[part] * table for part, table in errors.items()}, target_ratio)

    fits = ratio_of(uniform) <= target_ratio
    return deal(divergence, uniform, losses, make, samples, uniform_fits=fits, progress=progress)


@torch.no_grad()
def observe_latents(
    surveyed: Survey, adapter: CSKVAdapter, samples: Iterable[Int[Tensor, " tokens"]]
) -> Iterator[tuple[Part, Float[Tensor, "1 tokens rank"]]]:
    """Yield the latents of every layer's keys and values, one sample and one projection at a time, in fp32.

    Args:
        surveyed: the base model, nothing attached.
        adapter: made for it, with joint key factors.
        samples: token ids without padding.
    """
    teacher = Teacher(surveyed.model, surveyed.sites)
    with evaluation_mode(surveyed.model), teacher.watching():
        for sample in samples:
            for layer, seen in teacher.observe(sample[None]).items():
                for kind in ("k", "v"):
                    factors = getattr(adapter.factors(layer), kind).to(seen.x.device, torch.float32)
                    yield (layer, kind), factors.latents(seen.x.float())


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


def _rank(adapter: CSKVAdapter, part: Part) -> int:
    return getattr(adapter.factors(part[0]), part[1]).rank


def _losses(tables: Mapping[Part, Tensor], uniform: CSKVAdapter, width: int) -> dict[Part, float]:
    """Add up what an adapter of one width loses of every projection: the latents left out, and errors of those kept."""
    ranks = {part: _rank(uniform, part) for part in tables}
    return {part: float(own[: ranks[part], width].sum() + own[ranks[part] :, 0].sum()) for part, own in tables.items()}


def _layers(parts: Mapping[Part, Factors]) -> dict[int, LayerFactors]:
    return {index: LayerFactors(parts[index, "k"], parts[index, "v"]) for index, _ in parts}


def _check_mixed(config: CSKVConfig, target_ratio: float) -> None:
    if not config.mixed_widths or "pca" not in config.init:
        raise ConfigError(f"widths are chosen for PCA latents, init is {config.init!r}; give 'pca' or 'weighted-pca'")
    if config.key_factors != "joint" or config.head_groups > 1:
        raise ConfigError(
            f"mixed widths are for joint factors of one head group, got {config.key_factors} keys and "
            f"{config.head_groups} head groups; give --k-bits and --v-bits instead"
        )
    if not 0 < target_ratio < 1:
        raise ConfigError(f"target_ratio is {target_ratio!r}; expected a share of the uncompressed bytes in (0, 1)")


def _errors(
    surveyed: Survey, full: CSKVAdapter, config: CSKVConfig, samples: Sequence[Tensor]
) -> dict[Part, Float[Tensor, "rank choices"]]:
    """Measure the mean squared error of every full-rank latent at every width, fp64."""
    tables: dict[Part, Tensor] = {}
    for part, latents in observe_latents(surveyed, full, samples):
        table = width_errors(latents, config.block(part[1])).cpu() / len(samples)
        tables[part] = tables[part] + table if part in tables else table
    return tables


def _uniform(
    surveyed: Survey,
    config: CSKVConfig,
    statistics: Statistics,
    components: Mapping[Part, Components],
    target_ratio: float,
) -> CSKVAdapter:
    """Make the adapter of 4 bits throughout, in KIVI's blocks, at the largest ranks within the ratio, or the least."""
    plain = replace(config, mixed_widths=False, k_bits=UNIFORM_BITS, v_bits=UNIFORM_BITS, k_block=None, v_block=None)
    ranks = {}
    for site in surveyed.sites:
        budget = target_ratio * BITS_16 * site.kv_dim
        k_rank, v_rank = (_largest_rank(site.kv_dim, budget, plain.block(kind)) for kind in ("k", "v"))
        ranks[site.layer_idx] = k_rank, v_rank
    k_density, v_density = (rank / surveyed.sites[0].kv_dim for rank in next(iter(ranks.values())))
    plain = replace(plain, k_density=k_density, v_density=v_density)
    return Factorisation(surveyed, plain, statistics).adapter(ranks, components)


def _largest_rank(kv_dim: int, budget: float, block: tuple[int, int]) -> int:
    grids = (Grid.uniform(rank, UNIFORM_BITS, block) for rank in range(1, kv_dim + 1))
    return max((grid.rank for grid in grids if grid.rank * grid.bits_per_latent <= budget), default=1)


def _mixed(full: CSKVAdapter, config: CSKVConfig, errors: Mapping[Part, Tensor], target_ratio: float) -> CSKVAdapter:
    """Make the adapter of least error whose real bytes are within the ratio."""
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
    layers = _layers({(i, kind): ordered(getattr(full.factors(i), kind), kept[i, kind][0]).clone() for i, kind in kept})
    k_density, v_density = (
        sum(len(kept[i, kind][0]) for i in layers) / sum(_rank(full, (i, kind)) for i in layers) for kind in ("k", "v")
    )
    widths = {part: runs for part, (_, runs) in kept.items()}
    return CSKVAdapter(replace(config, k_density=k_density, v_density=v_density), layers, full.base, widths=widths)

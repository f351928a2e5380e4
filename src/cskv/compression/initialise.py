"""An untrained compressor: every layer's factors from its weights and its calibration statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.statistics import Statistics
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError, CSKVError, DataError, UnsupportedModelError
from cskv.factorization.asvd import asvd_factors
from cskv.factorization.basis import centred, hadamard_blocks, rotated
from cskv.factorization.commuting import RopePairs, commuting_factors, commuting_spectrum
from cskv.factorization.factors import Factors, LayerFactors
from cskv.factorization.pca import pca_factors, spectrum
from cskv.factorization.svd import svd_factors
from cskv.factorization.weighting import before_norm, key_gain, value_gain
from cskv.models.probe import SiteRecipe, probe
from cskv.models.sites import AttentionSite, Projection, find_sites
from cskv.models.survey import survey

Ranks = Mapping[int, tuple[int, int]]


def initialise(
    model: nn.Module, config: CSKVConfig, statistics: Statistics | None = None, ranks: Ranks | None = None
) -> CSKVAdapter:
    """Factorise every key and value projection of a model at the settings' densities.

    Args:
        model: the base model; its weights are only read.
        config: densities, init, key factors, head groups.
        statistics: of this model; needed for all but "svd".
        ranks: layer index -> (key rank, value rank), in place of the densities; from `cskv.compression.allocation`.

    Returns:
        An adapter with fp32 factors on the weights' devices.

    Raises:
        DataError: an init without its statistics, or a weight that is not finite; the message names the layer.
        AdapterError: the statistics belong to another model.
        ConfigError: a rank rounds to zero, the head groups do not divide the kv heads, or widths are to be mixed.
        UnsupportedModelError: the model has no layer that can be compressed, or a weight is offloaded.
    """
    if config.mixed_widths:
        raise ConfigError("mixed widths are chosen together with ranks; use cskv.compression.widths.allocate_widths")
    found = survey(model)
    if config.init != "svd":
        if statistics is None:
            raise DataError(
                f"init {config.init!r} needs calibration statistics, got none; calibrate first, or choose init 'svd'"
            )
        statistics.check_fits(found)
    recipes = found.recipes if "pca" in config.init else {}
    layers = {}
    for site in found.sites:
        try:
            layer = _Layer(site, config, statistics, recipes.get(site.layer_idx))
            pair = layer.uniform_ranks() if ranks is None else ranks[site.layer_idx]
            layers[site.layer_idx] = layer.factors(*pair)
        except CSKVError as error:
            raise type(error)(f"layer {site.layer_idx} ({site.name}): {error}") from error
    return CSKVAdapter(config, layers, found.base)


@torch.no_grad()
def in_few_bits(adapter: CSKVAdapter, config: CSKVConfig, statistics: Statistics | None = None) -> CSKVAdapter:
    """The factors of an adapter, trained or not, for latents in few bits: what post-training quantisation is.

    Args:
        adapter: of 16-bit latents; stays as it is.
        config: bits, blocks, window and group are taken from it, all else from the adapter.
        statistics: of the base model, to centre latents; without them their mean stays.

    Raises:
        ConfigError: the adapter's latents are in few bits already, or `config` mixes widths.
        AdapterError: the statistics belong to another model.
    """
    if adapter.config.is_quantised or config.mixed_widths:
        raise ConfigError(
            f"widths can be given to an adapter of 16-bit latents, and one for keys and one for values; got "
            f"{adapter.config.k_bits} and {adapter.config.v_bits} bits, mixed_widths {config.mixed_widths}"
        )
    if statistics is not None and sorted(statistics.layers) != adapter.layer_indices:
        raise AdapterError(f"the statistics have layers {sorted(statistics.layers)}, not {adapter.layer_indices}")
    taken = {name: getattr(config, name) for name in ("k_bits", "v_bits", "k_block", "v_block", "window", "group")}
    changed = dataclasses.replace(adapter.config, **taken)
    layers = {}
    for index in adapter.layer_indices:
        mean, pair = None if statistics is None else statistics.get(index, "input.mean"), {}
        for kind in ("k", "v"):
            factors = getattr(adapter.factors(index), kind)
            turned = kind == "v" or changed.key_factors == "joint"
            few = changed.bits(kind) < 16 and turned
            own = factors.clone()
            pair[kind] = _for_few_bits(own, mean) if few else own
        layers[index] = LayerFactors(**pair)
    return CSKVAdapter(changed, layers, adapter.base)


def part_spectra(model: nn.Module, config: CSKVConfig, statistics: Statistics) -> dict[tuple[int, str], Tensor]:
    """What each further latent of a projection saves of its loss, largest first.

    Args:
        model, config, statistics: as for `initialise`; the init is "pca" or "weighted-pca".

    Returns:
        (layer index, "k" or "v") -> (kv_dim,), fp64.
    """
    sites = find_sites(model)
    recipes = probe(model, sites)
    layers = [_Layer(site, config, statistics, recipes[site.layer_idx]) for site in sites]
    return {(layer.site.layer_idx, kind): layer.spectrum(kind) for layer in layers for kind in ("k", "v")}


@dataclass(frozen=True)
class _Layer:
    """One layer's factors. `recipe` is there for PCA only."""

    site: AttentionSite
    config: CSKVConfig
    statistics: Statistics | None
    recipe: SiteRecipe | None

    def uniform_ranks(self) -> tuple[int, int]:
        return self.config.k_rank(self.site.kv_dim), self.config.v_rank(self.site.kv_dim)

    def spectrum(self, kind: str) -> Tensor:
        """What each further latent saves of the loss that PCA minimises, largest first."""
        if kind == "k" and self.config.key_factors == "commuting":
            return commuting_spectrum(*self._commuting_problem())
        return spectrum(self._statistic(f"{kind}.mean"), self._statistic(f"{kind}.moment"), self._gain(kind))

    def factors(self, k_rank: int, v_rank: int) -> LayerFactors:
        site, config = self.site, self.config
        if site.num_kv_heads % config.head_groups:
            raise ConfigError(f"{config.head_groups} head groups do not divide {site.num_kv_heads} kv heads")
        commuting = config.key_factors == "commuting"
        keys = self._commuting(k_rank) if commuting else self._conditioned("k", self._grouped("k", site.k, k_rank))
        return LayerFactors(k=keys, v=self._conditioned("v", self._grouped("v", site.v, v_rank)))

    def _conditioned(self, kind: str, factors: Factors) -> Factors:
        """In a basis that suits few bits, where few are spent: centred, and turned so that channels vary alike."""
        if self.config.bits(kind) == 16:
            return factors
        return _for_few_bits(factors, None if self.statistics is None else self._statistic("input.mean"))

    def _grouped(self, kind: str, projection: Projection, rank: int) -> Factors:
        groups = self.config.head_groups
        size = projection.kv_dim // groups
        gain = self._gain(kind)
        return Factors.grouped(
            [self._part(kind, projection, slice(g * size, (g + 1) * size), rank // groups, gain) for g in range(groups)]
        )

    def _part(self, kind: str, projection: Projection, rows: slice, rank: int, gain: Tensor | None) -> Factors:
        if projection.weight.is_meta:
            raise UnsupportedModelError("the weight is offloaded; load the model onto CPU or GPU to factorise it")
        weight, bias = projection.weight[rows], None if projection.bias is None else projection.bias[rows]
        if self.config.init == "svd":
            return svd_factors(weight, rank, bias)
        if self.config.init == "asvd":
            mean_abs = self._statistic("input.mean_abs").to(weight.device)
            return asvd_factors(weight, mean_abs, rank, alpha=self.config.asvd_alpha, bias=bias)
        return pca_factors(
            weight,
            self._statistic(f"{kind}.mean")[rows],
            self._statistic(f"{kind}.moment")[rows, rows],
            rank,
            bias=bias,
            gain=None if gain is None else gain[rows, rows],
        )

    def _commuting(self, rank: int) -> Factors:
        moment, pairs, gain = self._commuting_problem()
        return commuting_factors(moment, pairs, rank, gain).to(self.site.k.weight.device)

    def _commuting_problem(self) -> tuple[Tensor, RopePairs, Tensor | None]:
        if self.recipe is None or self.recipe.pairs is None:
            raise UnsupportedModelError(
                "its keys are not rotated: commuting factors are for keys with RoPE; use joint ones"
            )
        gain = self._key_gain() if self.config.init == "weighted-pca" else None
        moment = self.statistics.key_moment(self.site.layer_idx)  # type: ignore[union-attr]
        return moment, self.recipe.pairs, gain

    def _gain(self, kind: str) -> Tensor | None:
        if self.config.init != "weighted-pca":
            return None
        if kind == "v":
            weight = self.site.output_weight
            if weight is None:
                raise UnsupportedModelError("its output projection was not found, which weighted PCA needs; use 'pca'")
            return value_gain(weight, self.site.num_kv_heads, self.site.head_dim)
        gain = self._key_gain()
        if self.recipe is not None and self.recipe.keys.norm is not None:
            gain = before_norm(gain, self._statistic("k.moment"), self._statistic("key.moment"))
        return torch.diag(gain)

    def _key_gain(self) -> Tensor:
        pairs = None if self.recipe is None else self.recipe.pairs
        return key_gain(self._statistic("query.energy"), pairs, self.site.head_dim)

    def _statistic(self, name: str) -> Tensor:
        return self.statistics.get(self.site.layer_idx, name)  # type: ignore[union-attr]


def _for_few_bits(factors: Factors, input_mean: Tensor | None) -> Factors:
    if input_mean is not None:
        now = 0 if factors.down_bias is None else factors.down_bias
        factors = centred(factors, factors.down @ input_mean.to(factors.down) + now)
    return rotated(factors, hadamard_blocks(factors.rank // factors.groups).to(factors.down))

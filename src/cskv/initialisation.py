"""An untrained compressor: every layer's factors from its weights and its calibration statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cskv.adapter import BaseModelInfo, CSKVAdapter
from cskv.config import CSKVConfig
from cskv.errors import ConfigError, CSKVError, DataError, UnsupportedModelError
from cskv.factorization.asvd import asvd_factors
from cskv.factorization.commuting import commuting_factors
from cskv.factorization.factors import Factors, LayerFactors
from cskv.factorization.pca import pca_factors
from cskv.factorization.svd import svd_factors
from cskv.factorization.weighting import before_norm, key_gain, value_gain
from cskv.models.probe import SiteRecipe, probe
from cskv.models.sites import AttentionSite, Projection, find_sites
from cskv.statistics import Statistics


def initialise(model: nn.Module, config: CSKVConfig, statistics: Statistics | None = None) -> CSKVAdapter:
    """Factorise every key and value projection of a model at the settings' densities.

    Args:
        model: the base model; its weights are only read.
        config: densities, init, key factors, head groups.
        statistics: of this model; needed for all but "svd".

    Returns:
        An adapter with fp32 factors on the weights' devices.

    Raises:
        DataError: an init without its statistics, or a weight that is not finite; the message names the layer.
        AdapterError: the statistics belong to another model.
        ConfigError: a rank rounds to zero, or the head groups do not divide the kv heads.
        UnsupportedModelError: the model has no layer that can be compressed, or a weight is offloaded.
    """
    sites = find_sites(model)
    base = BaseModelInfo.from_model(model)
    if config.init != "svd":
        if statistics is None:
            raise DataError(
                f"init {config.init!r} needs calibration statistics, got none; calibrate first, or choose init 'svd'"
            )
        statistics.check_fits(base, sites)
    recipes = probe(model, sites) if "pca" in config.init else {}
    layers = {}
    for site in sites:
        try:
            layers[site.layer_idx] = _Layer(site, config, statistics, recipes.get(site.layer_idx)).factors()
        except CSKVError as error:
            raise type(error)(f"layer {site.layer_idx} ({site.name}): {error}") from error
    return CSKVAdapter(config, layers, base)


@dataclass(frozen=True)
class _Layer:
    """One layer's factors. `recipe` is there for PCA only."""

    site: AttentionSite
    config: CSKVConfig
    statistics: Statistics | None
    recipe: SiteRecipe | None

    def factors(self) -> LayerFactors:
        site, config = self.site, self.config
        if site.num_kv_heads % config.head_groups:
            raise ConfigError(f"{config.head_groups} head groups do not divide {site.num_kv_heads} kv heads")
        k_rank, v_rank = config.k_rank(site.kv_dim), config.v_rank(site.kv_dim)
        commuting = config.key_factors == "commuting"
        keys = self._commuting(k_rank) if commuting else self._grouped("k", site.k, k_rank)
        return LayerFactors(k=keys, v=self._grouped("v", site.v, v_rank))

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
        if self.recipe is None or self.recipe.pairs is None:
            raise UnsupportedModelError(
                "its keys are not rotated: commuting factors are for keys with RoPE; use joint ones"
            )
        gain = self._key_gain() if self.config.init == "weighted-pca" else None
        moment = self.statistics.key_moment(self.site.layer_idx)  # type: ignore[union-attr]
        factors = commuting_factors(moment, self.recipe.pairs, rank, gain)
        return factors.to(self.site.k.weight.device)

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

"""An untrained compressor: every layer's factors from its weights and, for ASVD, its calibration statistics."""

from __future__ import annotations

from torch import nn

from cskv.adapter import BaseModelInfo, CSKVAdapter
from cskv.config import CSKVConfig
from cskv.errors import CSKVError, DataError, UnsupportedModelError
from cskv.factorization.asvd import asvd_factors
from cskv.factorization.factors import Factors, LayerFactors
from cskv.factorization.svd import svd_factors
from cskv.models.sites import AttentionSite, Projection, find_sites
from cskv.statistics import Statistics


def initialise(model: nn.Module, config: CSKVConfig, statistics: Statistics | None = None) -> CSKVAdapter:
    """Factorise every key and value projection of a model at the settings' densities.

    Args:
        model: the base model; its weights are only read.
        config: densities, "svd" or "asvd", alpha.
        statistics: of this model; needed for "asvd".

    Returns:
        An adapter with fp32 factors on the weights' devices.

    Raises:
        DataError: "asvd" without statistics, or a weight that is not finite; the message names the layer.
        AdapterError: the statistics belong to another model.
        ConfigError: a rank rounds to zero.
        UnsupportedModelError: the model has no layer that can be compressed, or a weight is offloaded.
    """
    sites = find_sites(model)
    base = BaseModelInfo.from_model(model)
    if config.init == "asvd":
        if statistics is None:
            raise DataError("init 'asvd' needs calibration statistics, got none; calibrate first, or choose init 'svd'")
        statistics.check_fits(base, sites)
    return CSKVAdapter(config, {site.layer_idx: _layer(site, config, statistics) for site in sites}, base)


def _layer(site: AttentionSite, config: CSKVConfig, statistics: Statistics | None) -> LayerFactors:
    k_rank, v_rank = config.k_rank(site.kv_dim), config.v_rank(site.kv_dim)
    try:
        return LayerFactors(
            k=_factors(site.k, site.layer_idx, k_rank, config, statistics),
            v=_factors(site.v, site.layer_idx, v_rank, config, statistics),
        )
    except CSKVError as error:
        raise type(error)(f"layer {site.layer_idx} ({site.name}): {error}") from error


def _factors(
    projection: Projection, layer_idx: int, rank: int, config: CSKVConfig, statistics: Statistics | None
) -> Factors:
    weight = projection.weight
    if weight.is_meta:
        raise UnsupportedModelError("the weight is offloaded; load the model onto CPU or GPU to factorise it")
    if config.init == "asvd" and statistics is not None:
        mean_abs = statistics.mean_abs(layer_idx).to(weight.device)
        return asvd_factors(weight, mean_abs, rank, alpha=config.asvd_alpha, bias=projection.bias)
    return svd_factors(weight, rank, projection.bias)

"""Reconstruction losses of keys and values of given text, layer by layer: the loss that PCA minimises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import Teacher
from cskv.errors import DataError
from cskv.factorization.factors import Factors
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.recipe import NormStyle
from cskv.models.survey import survey
from cskv.quantization.fake import read_back
from cskv.quantization.grid import Grid


@dataclass(frozen=True)
class LayerLoss:
    """One layer's mean squared error over tokens and channels.

    Attributes:
        layer: its index in the cache.
        k, v: of keys and of values, as their projections make them.
    """

    layer: int
    k: float
    v: float


@torch.no_grad()
def reconstruction_losses(
    model: nn.Module, adapter: CSKVAdapter, samples: Iterable[Int[Tensor, " tokens"]]
) -> list[LayerLoss]:
    """Measure the loss of every layer, before RoPE, which changes no distance.

    Commuting key factors act on keys after the norm. Where there is one, their error is that of normalised keys, and
    does not compare with that of other factors.

    Args:
        model: the base model, nothing attached.
        adapter: made for it.
        samples: token ids, equally long.

    Raises:
        DataError: there are no samples.
    """
    found = survey(model)
    commuting = adapter.config.key_factors == "commuting"
    recipes = found.recipes if commuting else {}
    totals = {site.layer_idx: torch.zeros(2, dtype=torch.float64) for site in found.sites}
    count = 0
    teacher = Teacher(model, found.sites)
    with evaluation_mode(model), teacher.watching():
        for sample in samples:
            count += 1
            for layer, seen in teacher.observe(sample[None]).items():
                factors, keys = adapter.factors(layer), seen.k
                if commuting and recipes[layer].keys.norm_style is not NormStyle.NONE:
                    keys = recipes[layer].keys.normalised(keys)
                k_grid, v_grid = adapter.grids(layer)
                # Keys are compared before RoPE, where the bias of commuting factors is as it stands.
                source = seen.x if not commuting else keys if factors.k.bias is None else keys - factors.k.bias.to(keys)
                losses = (
                    _loss(factors.k, k_grid, source, keys),
                    _loss(factors.v, v_grid, seen.x, seen.v),
                )
                totals[layer] += torch.tensor(losses, dtype=torch.float64)
    if count == 0:
        raise DataError("there are no samples to rebuild keys and values of; give text")
    return [LayerLoss(layer, *(total / count).tolist()) for layer, total in totals.items()]


def _loss(factors: Factors, grid: Grid | None, source: Tensor, exact: Tensor) -> float:
    factors = factors.to(exact.device, torch.float32)
    return mse_loss(factors.expand(read_back(factors.latents(source.float()), grid)), exact.float()).item()

"""One streaming pass over text that takes statistics of every attention layer.

Sums are kept in fp64, so that bf16 models and millions of tokens lose nothing, and memory depends on the model's shape
only, never on the number of samples. Second moments are products in fp32, one forward at a time, of values from which
the first forward's mean is taken off: a large mean would otherwise drown small variances in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cskv.calibration.hooks import decode
from cskv.calibration.statistics import Statistics
from cskv.errors import DataError
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of, plain_arithmetic
from cskv.models.sites import Watcher, watching
from cskv.models.survey import Survey, survey


class _Means:
    """Running means of named quantities, by layer: fp64 sums on the layer's device, each with a token count."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, tuple[Tensor, int]]] = {}
        self.shifts: dict[tuple[int, str], Tensor] = {}

    def add(self, layer_idx: int, name: str, total: Tensor, tokens: int) -> None:
        sums = self.sums.setdefault(layer_idx, {})
        before, count = sums.get(name, (torch.zeros_like(total), 0))
        sums[name] = before + total, count + tokens

    def add_input(self, layer_idx: int, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        self.add(layer_idx, "input.mean_abs", flat.abs().sum(0, dtype=torch.float64), flat.shape[0])
        self.add(layer_idx, "input.mean", flat.sum(0, dtype=torch.float64), flat.shape[0])

    def add_output(self, layer_idx: int, kind: str, y: Tensor) -> None:
        flat = y.flatten(0, -2).float()
        shift = self.shifts.setdefault((layer_idx, kind), flat.mean(0))
        flat = flat - shift
        self.add(layer_idx, f"{kind}.mean", flat.sum(0, dtype=torch.float64), flat.shape[0])
        self.add(layer_idx, f"{kind}.moment", (flat.T @ flat).double(), flat.shape[0])

    def add_energy(self, layer_idx: int, queries: Tensor, kv_dim: int) -> None:
        """Add q^2, summed over the query heads of each kv head, of queries (batch, heads, tokens, head_dim)."""
        head_dim = queries.shape[-1]
        energy = queries.float().square().sum((0, 2), dtype=torch.float64)
        per_kv_head = energy.unflatten(0, (kv_dim // head_dim, -1)).sum(1)
        self.add(layer_idx, "query.energy", per_kv_head.flatten(), queries.shape[0] * queries.shape[2])

    def means(self) -> dict[int, dict[str, Tensor]]:
        means = {
            layer_idx: {name: total / count for name, (total, count) in sums.items()}
            for layer_idx, sums in sorted(self.sums.items())
        }
        for (layer_idx, kind), shift in self.shifts.items():
            layer, shift = means[layer_idx], shift.double()
            mean = layer[f"{kind}.mean"]
            layer[f"{kind}.moment"] = (
                layer[f"{kind}.moment"] + torch.outer(mean, shift) + torch.outer(shift, mean + shift)
            )
            layer[f"{kind}.mean"] = mean + shift
        return {i: {name: tensor.cpu() for name, tensor in layer.items()} for i, layer in means.items()}


def calibrate(
    model: nn.Module,
    samples: Iterable[Int[Tensor, "*batch tokens"]],
    *,
    covariance: bool = True,
    source: str | None = None,
    seed: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Statistics:
    """Take statistics of a model's layers over token samples.

    The model runs where it is, frozen; its mode and hooks are as before when this returns or raises.

    Args:
        model: a transformers decoder model.
        samples: token ids, one sample or a batch of equally long ones at a time; consumed once.
        covariance: also take the moments of keys and values and the energy of queries, which all but plain SVD and
            ASVD need.
        source: the text's name, to be noted in the statistics; taken from `TokenSamples` where not given.
        seed: the same for the seed of its order.
        progress: called with (batches done, batches in all or None) after each batch.

    Raises:
        CSKVError: a compressor is attached to the model.
        UnsupportedModelError: the model has no layer that can be compressed.
        DataError: there are no samples, or a layer's statistics are not finite; the message names the layer.
    """
    found = survey(model)
    base = found.base  # runs the projections, so before anything watches them
    means = _Means()
    watchers: dict[str, Any] = {"inputs": means.add_input}
    if covariance:
        watchers |= _moment_watchers(means, found)
    total = len(samples) if isinstance(samples, Sized) else None
    tokens = 0

    def statistics() -> Statistics:
        result = Statistics(
            layers=means.means(),
            base=base,
            tokens=tokens,
            source=source if source is not None else getattr(getattr(samples, "source", None), "name", ""),
            seed=seed if seed is not None else getattr(samples, "seed", 0),
        )
        result.check_finite(f"after {tokens} tokens: the model overflows; try it in bf16 or fp32")
        return result

    with plain_arithmetic(device_of(model)), evaluation_mode(model), watching(found.sites, **watchers):
        for done, sample in enumerate(samples, start=1):
            decode(model, sample if sample.ndim > 1 else sample[None])
            tokens += sample.numel()
            if done == 1:
                statistics()  # a model that overflows does so at once; better told now than after an hour
            if progress is not None:
                progress(done, total)
        if tokens == 0:
            raise DataError("there are no samples to calibrate on; give text")
        return statistics()


def _moment_watchers(means: _Means, found: Survey) -> dict[str, Watcher]:
    recipes, kv_dims = found.recipes, {site.layer_idx: site.kv_dim for site in found.sites}

    def on_keys(layer_idx: int, y: Tensor) -> None:
        means.add_output(layer_idx, "k", y)
        keys = recipes[layer_idx].keys
        if keys.norm is not None:
            means.add_output(layer_idx, "key", keys.normalised(y))

    def on_queries(layer_idx: int, y: Tensor) -> None:
        means.add_energy(layer_idx, recipes[layer_idx].queries.heads(y, None, None), kv_dims[layer_idx])

    return {
        "keys": on_keys,
        "values": lambda layer_idx, y: means.add_output(layer_idx, "v", y),
        "queries": on_queries,
    }

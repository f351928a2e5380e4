"""One streaming pass over text that takes statistics of every attention layer.

Sums are kept in fp64, so that bf16 models and millions of tokens lose nothing, and memory depends on the model's shape
only, never on the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cskv.adapter import BaseModelInfo
from cskv.capture import decode, frozen, watching
from cskv.errors import DataError
from cskv.models.sites import find_sites
from cskv.statistics import Statistics

__all__ = ["Statistics", "calibrate"]

Progress = Callable[[int, int | None], None]


class _Means:
    """Running means of named quantities, by layer: fp64 sums on the layer's device, and token counts."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.tokens: dict[int, dict[str, int]] = {}

    def add(self, layer_idx: int, name: str, total: Tensor, tokens: int) -> None:
        sums = self.sums.setdefault(layer_idx, {})
        counts = self.tokens.setdefault(layer_idx, {})
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + tokens

    def add_input(self, layer_idx: int, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        self.add(layer_idx, "input.mean_abs", flat.abs().sum(0, dtype=torch.float64), flat.shape[0])

    def add_output(self, layer_idx: int, kind: str, y: Tensor) -> None:
        flat = y.flatten(0, -2).double()
        self.add(layer_idx, f"{kind}.mean", flat.sum(0), flat.shape[0])
        self.add(layer_idx, f"{kind}.moment", flat.T @ flat, flat.shape[0])

    def means(self) -> dict[int, dict[str, Tensor]]:
        return {
            layer_idx: {name: (total / self.tokens[layer_idx][name]).cpu() for name, total in sums.items()}
            for layer_idx, sums in sorted(self.sums.items())
        }


def calibrate(
    model: nn.Module,
    samples: Iterable[Int[Tensor, "*batch tokens"]],
    *,
    covariance: bool = False,
    source: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Take statistics of a model's layers over token samples.

    The model runs where it is, frozen; its mode and hooks are as before when this returns or raises.

    Args:
        model: a transformers decoder model.
        samples: token ids, one sample or a batch of equally long ones at a time; consumed once.
        covariance: also take first and second moments of keys and values, for `Statistics.singular_values`.
        source: the text's name, to be noted in the statistics; taken from `TokenSamples` where not given.
        seed: the same for the seed of its order.
        progress: called with (batches done, batches in all or None) after each batch.

    Raises:
        UnsupportedModelError: the model has no layer that can be compressed.
        DataError: there are no samples, or a layer's statistics are not finite; the message names the layer.
    """
    sites = find_sites(model)
    means = _Means()
    watchers: dict[str, Any] = {"inputs": means.add_input}
    if covariance:
        watchers["keys"] = lambda layer_idx, y: means.add_output(layer_idx, "k", y)
        watchers["values"] = lambda layer_idx, y: means.add_output(layer_idx, "v", y)
    total = len(samples) if isinstance(samples, Sized) else None
    tokens = 0

    def statistics() -> Statistics:
        result = Statistics(
            layers=means.means(),
            base=BaseModelInfo.from_model(model),
            tokens=tokens,
            source=source if source is not None else getattr(getattr(samples, "source", None), "name", ""),
            seed=seed if seed is not None else getattr(samples, "seed", 0),
        )
        result.check_finite(f"after {tokens} tokens: the model overflows; try it in bf16 or fp32")
        return result

    with frozen(model), watching(sites, **watchers):
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

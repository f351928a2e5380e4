"""Latents of real text, as the cache would store them: what widths are chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import Teacher
from cskv.compression.reading import Part
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.sites import find_sites


@torch.no_grad()
def observe_latents(
    model: nn.Module, adapter: CSKVAdapter, samples: Iterable[Int[Tensor, " tokens"]]
) -> Iterator[tuple[Part, Float[Tensor, "1 tokens rank"]]]:
    """The latents of every layer's keys and values, one sample and one projection at a time, in fp32.

    Args:
        model: the base model, nothing attached.
        adapter: made for it, with joint key factors.
        samples: token ids without padding.
    """
    sites = find_sites(model)
    teacher = Teacher(model, sites)
    with evaluation_mode(model), teacher.watching():
        for sample in samples:
            for layer, seen in teacher.observe(sample[None]).items():
                for kind in ("k", "v"):
                    factors = getattr(adapter.factors(layer), kind).to(seen.x.device, torch.float32)
                    yield (layer, kind), factors.latents(seen.x.float())

"""The frozen base model as calibration and training run it: the decoder without its language head, under `no_grad`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of
from cskv.models.sites import AttentionSite, watching


@torch.no_grad()
def decode(model: nn.Module, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens hidden"]:
    """Run the decoder, without the language head, a cache or gradients."""
    decoder = getattr(model, "base_model", model)
    return decoder(input_ids=input_ids.to(device_of(model)), use_cache=False)[0]


class Observation(NamedTuple):
    """The input and the outputs of one layer of the base model in a forward.

    Attributes:
        x: the layer input, (batch, tokens, hidden).
        k, v: the projections' outputs, bias included, (batch, tokens, kv_dim).
    """

    x: Float[Tensor, "batch tokens hidden"]
    k: Float[Tensor, "batch tokens kv_dim"]
    v: Float[Tensor, "batch tokens kv_dim"]


class Teacher:
    """The frozen base model. `observe` works inside the `watching` block only.

    Args:
        model: a transformers decoder model.
        sites: the layers to observe.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        self.model = model
        self.sites = sites
        self._seen: tuple[dict[int, Tensor], ...] = ({}, {}, {})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put the model into evaluation mode and hook it; undone at the end whatever happens."""
        inputs, keys, values = (seen.__setitem__ for seen in self._seen)
        with evaluation_mode(self.model), watching(self.sites, inputs=inputs, keys=keys, values=values):
            yield

    def observe(self, input_ids: Int[Tensor, "batch tokens"]) -> dict[int, Observation]:
        """Run the model on tokens; nothing is kept for a backward pass."""
        decode(self.model, input_ids)
        indices = [site.layer_idx for site in self.sites]
        return {index: Observation(*(seen.pop(index) for seen in self._seen)) for index in indices}

"""Watch a frozen model's attention layers: their inputs, and the keys and values that their projections make.

Calibration and training both run the decoder without its language head, under `no_grad` and in evaluation mode, and see
each layer through hooks that are removed again whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of
from cskv.models.projection import Projection
from cskv.models.sites import AttentionSite

__all__ = ["Observation", "Teacher", "Watcher", "decode", "device_of", "evaluation_mode", "watching"]

Watcher = Callable[[int, Tensor], None]


@contextmanager
def watching(
    sites: Sequence[AttentionSite],
    *,
    inputs: Watcher | None = None,
    keys: Watcher | None = None,
    values: Watcher | None = None,
    queries: Watcher | None = None,
) -> Iterator[None]:
    """Call the watchers with (layer index, tensor) during every forward inside the block.

    Args:
        sites: the layers to watch.
        inputs: gets the layer input x, (batch, tokens, hidden).
        keys: gets the key projection's output, bias included, before any norm and RoPE, (batch, tokens, kv_dim).
        values, queries: the same of the value and the query projection.
    """
    with ExitStack() as hooks:
        for site in sites:
            if inputs is not None:
                hook = site.module.register_forward_pre_hook(_input_hook(site.layer_idx, inputs), with_kwargs=True)
                hooks.callback(hook.remove)
            for projection, watcher in ((site.q, queries), (site.k, keys), (site.v, values)):
                if watcher is not None:
                    hook = projection.linear.register_forward_hook(_output_hook(site.layer_idx, projection, watcher))
                    hooks.callback(hook.remove)
        yield


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
        inputs, keys, values = self._seen
        return {
            site.layer_idx: Observation(*(seen.pop(site.layer_idx) for seen in (inputs, keys, values)))
            for site in self.sites
        }


def _input_hook(layer_idx: int, watcher: Watcher) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher(layer_idx, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    return hook


def _output_hook(
    layer_idx: int, projection: Projection, watcher: Watcher
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        watcher(layer_idx, projection.select(output))

    return hook

"""Gradient checkpointing of decoder layers: the activations of one layer at a time, for a second forward of each.

transformers' own switch works in training mode only, where dropout would blur what is learnt; and what a layer computes
here depends on hooks that are gone when the backward pass comes, so they are put back for the second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from cskv.models.sites import AttentionSite


@contextmanager
def checkpointed_layers(
    model: nn.Module, sites: Sequence[AttentionSite], scope: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Let the layers that hold the sites keep only their inputs for the backward pass, and run again in it.

    Args:
        model: a decoder model.
        sites: its attention layers; what is checkpointed is the module around each (the decoder layer).
        scope: what the second forward of a layer must run in, for the same numbers as the first.
    """
    with ExitStack() as stack:
        for site in sites:
            layer = model.get_submodule(site.name.rpartition(".")[0])
            before = layer.__dict__.get("forward")  # Accelerate's device_map puts its own there
            layer.forward = _checkpointed(layer.forward, scope)
            stack.callback(_restore, layer, before)
        yield


def _restore(layer: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        del layer.forward
    else:
        layer.forward = before


def _checkpointed(forward: Callable[..., Any], scope: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), scope()), **kwargs)

    return run

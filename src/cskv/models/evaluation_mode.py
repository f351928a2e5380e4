"""A model that only answers: evaluation mode for a while, and afterwards the model as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; at the end, give back every module's mode and every rotary embedding's state.

    Dynamic and longrope embeddings change their frequencies with the lengths that they see, so a forward of ours would
    otherwise change what the model says next.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = [_RotaryState(module) for module in model.modules() if is_rotary_embedding(module)]
    model.eval()
    try:
        yield
    finally:
        for state in states:
            state.restore()
        for module, training in modes:
            module.training = training


def is_rotary_embedding(module: nn.Module) -> bool:
    """Return whether a module makes cos and sin of positions."""
    return type(module).__name__.endswith("RotaryEmbedding")


class _RotaryState:
    """The attributes and buffers of a rotary embedding, which may be replaced and written to."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._buffers = dict(module._buffers)
        tensors = (*self._attributes.values(), *self._buffers.values())
        self._values = [(tensor, tensor.clone()) for tensor in tensors if isinstance(tensor, Tensor)]

    @torch.inference_mode()  # in which any tensor may be written to
    def restore(self) -> None:
        for held, saved in ((vars(self._module), self._attributes), (self._module._buffers, self._buffers)):
            for name in held.keys() - saved.keys():
                del held[name]
            held.update(saved)
        for tensor, value in self._values:
            tensor.copy_(value)

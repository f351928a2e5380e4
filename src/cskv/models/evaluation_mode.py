"""A model that only answers: evaluation mode for a while, and afterwards the model as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; at the end, give back every module's mode and every rotary embedding's state.

    Dynamic and longrope embeddings change their frequencies with the lengths that they see, so a forward of ours would
    otherwise change what the model says next.
    """
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as states:
        for module, _ in modes:
            if is_rotary_embedding(module):
                states.enter_context(_restoring(module))
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep the model's weights from collecting gradients for a while."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def is_rotary_embedding(module: nn.Module) -> bool:
    """Return whether a module makes cos and sin of positions."""
    return type(module).__name__.endswith("RotaryEmbedding")


@contextmanager
def _restoring(module: nn.Module) -> Iterator[None]:
    """Give a module back its attributes and buffers, which may be replaced and written to."""
    stores = [(held, dict(held)) for held in (vars(module), module._buffers)]
    values = [
        (tensor, tensor.clone()) for _, saved in stores for tensor in saved.values() if isinstance(tensor, Tensor)
    ]
    try:
        yield
    finally:
        for held, saved in stores:
            for name in held.keys() - saved.keys():
                del held[name]
            held.update(saved)
        with torch.inference_mode():  # in which any tensor may be written to
            for tensor, value in values:
                tensor.copy_(value)

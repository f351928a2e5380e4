"""Where a module computes, also when accelerate keeps its weights elsewhere, and arithmetic as its tensors have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from cskv.errors import UnsupportedModelError


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes; of a whole model, the one that takes its token ids.

    Raises:
        UnsupportedModelError: its weights are on the meta device, and nothing brings them to another one.
    """
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    for part in (module if embedding is None else embedding).modules():
        hook = getattr(part, "_hf_hook", None)
        for single in (hook, *getattr(hook, "hooks", ())):
            execution_device = getattr(single, "execution_device", None)
            if execution_device is not None:
                return torch.device(execution_device)
        for tensor in chain(part.parameters(recurse=False), part.buffers(recurse=False)):
            if not tensor.is_meta:
                return tensor.device
    raise UnsupportedModelError(f"the weights of {type(module).__name__} are on no device; load them onto CPU or GPU")


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' own dtypes and without gradients; results outlive `torch.inference_mode()` around it."""
    with torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
        yield

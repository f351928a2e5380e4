"""Scratch tensors that are made once and used again, tile after tile and step after step.

On a CPU a fresh tensor of some megabytes costs more in page faults than most of what is done with it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

HOST_MEMORY = ("memory", torch.uint8, torch.device("cpu"))


class Scratch(threading.local):
    """Named scratch tensors, others in every thread. A name's tensor is valid until its thread takes the name again."""

    def __init__(self) -> None:
        self._storages: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised contiguous tensor. Memory grows to the largest that was asked for under a name."""
        if torch.compiler.is_compiling():  # the compiler plans memory itself
            return torch.empty(shape, dtype=dtype, device=device)
        key, size = (name, dtype, device), math.prod(shape)
        storage = self._storages.get(key)
        if storage is None or storage.shape[0] < size:
            storage = self._storages[key] = allocate((size,), dtype, device)
        return storage[:size].view(shape)

    def memory(self, size: int) -> Tensor:
        """Return at least so many bytes on the host, for what divides them itself: the same until more are asked."""
        storage = self._storages.get(HOST_MEMORY)
        if storage is None or storage.shape[0] < size:
            storage = self._storages[HOST_MEMORY] = allocate((size,), torch.uint8, HOST_MEMORY[2])
        return storage

    def nbytes(self) -> int:
        """Count the bytes allocated for the calling thread."""
        return sum(storage.untyped_storage().nbytes() for storage in self._storages.values())

    def clear(self) -> None:
        """Free all tensors of the calling thread."""
        self._storages.clear()


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor that may be written in any mode, also where it is made in inference mode."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)

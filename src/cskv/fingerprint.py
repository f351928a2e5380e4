"""Short hashes of tensors: what ties a result, a cache or a file to the weights that it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes, dtypes and sums to 16 hexadecimal digits: the same with any number of threads, in any order.

    For weights that were worked out anew, which rounding may change; `digest` tells tensors of equal sums apart.
    """
    lines = []
    for name, tensor in tensors:
        values = tensor.detach().double()
        sums = f"{values.abs().sum().item():.9g} {values.square().sum().item():.9g}"
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def digest(tensors: Iterable[tuple[str, Tensor]], *facts: object) -> str:
    """Hash every bit of the tensors, their names, shapes and dtypes, and `facts`, to 16 hexadecimal digits."""
    found = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]

"""A short hash by which a result is tied to the weights that it is of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits of names, shapes, dtypes and sums; the same with any number of threads and any order."""
    lines = []
    for name, tensor in tensors:
        values = tensor.detach().double()
        sums = f"{values.abs().sum().item():.9g} {values.square().sum().item():.9g}"
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]

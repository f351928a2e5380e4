"""The latents of a few new tokens on a CPU, where torch takes longer to begin such a product than to compute it."""

from __future__ import annotations

from struct import Struct

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from cskv.attention.cpu.arguments import KINDS
from cskv.attention.cpu.library import library

PROJECTION = Struct("=10q")  # the fields of `Projection` in kernels/project.h
MOST_TOKENS = 4


def project(
    x: Float[Tensor, "batch new hidden"], down: Float[Tensor, "rank hidden"], bias: Float[Tensor, " rank"] | None
) -> Float[Tensor, "batch new rank"]:
    """Return `x @ down.T + bias`, by the compiled kernels for a few tokens in bfloat16, by torch for all else.

    Args:
        x: in the dtype of `down`.
        down, bias: the down-projection.
    """
    batch, new, hidden = x.shape
    if x.dtype != torch.bfloat16 or not x.is_cpu or batch * new > MOST_TOKENS or torch.compiler.is_compiling():
        return linear(x, down, bias)
    loaded, strides = library(), x.stride()
    is_packed = strides[2] == 1 and down.stride()[1] == 1 and (new == 1 or batch == 1)
    if loaded is None or not is_packed or torch.is_grad_enabled():
        return linear(x, down, bias)
    out = torch.empty(batch, new, down.shape[0], dtype=x.dtype)
    call = PROJECTION.pack(
        KINDS[x.dtype], batch * new, hidden, down.shape[0], x.data_ptr(), down.data_ptr(),
        0 if bias is None else bias.data_ptr(), 2 * strides[0 if new == 1 else 1], 2 * down.stride()[0], out.data_ptr(),
    )  # fmt: skip
    loaded.project(loaded.level, call, torch.get_num_threads())
    return out

"""The same factors in another basis of their latents: (U R^-1, R D) rebuilds what (U, D) does, for any invertible R.

In full precision nothing changes. In few bits it does: a grid suits latents that are centred, and one width for all
suits latents that vary alike, without outliers, which a rotation makes of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cskv.factorization.factors import Factors


def centred(factors: Factors, mean: Float[Tensor, " rank"]) -> Factors:
    """Subtract the mean of the latents, which moves into the bias.

    Args:
        factors: with any `down_bias`.
        mean: of the latents as they are now.
    """
    before = torch.zeros_like(mean) if factors.down_bias is None else factors.down_bias
    offset = torch.zeros_like(factors.up[:, 0]) if factors.bias is None else factors.bias
    unbiased = Factors(factors.down, factors.up, torch.zeros_like(offset))
    return Factors(factors.down, factors.up, offset + unbiased.expand(mean), before - mean)


def scaled(factors: Factors, scale: Float[Tensor, " rank"]) -> Factors:
    """Multiply the latents by a positive scale per channel."""
    groups, per_group = factors.groups, factors.up.shape[1]
    by_row = scale.unflatten(0, (groups, per_group)).repeat_interleave(factors.kv_dim // groups, dim=0)
    down_bias = None if factors.down_bias is None else factors.down_bias * scale
    return Factors(factors.down * scale[:, None], factors.up / by_row, factors.bias, down_bias)


def rotated(factors: Factors, rotation: Float[Tensor, "group_rank group_rank"]) -> Factors:
    """Multiply the latents, with head groups those of each group, by an orthogonal matrix: `rotation @ latents`."""
    by_group = factors.down.unflatten(0, (factors.groups, -1))
    down_bias = None
    if factors.down_bias is not None:
        down_bias = (factors.down_bias.unflatten(0, (factors.groups, -1)) @ rotation.T).flatten()
    return Factors((rotation @ by_group).flatten(0, 1), factors.up @ rotation.T, factors.bias, down_bias)


def ordered(factors: Factors, order: Int[Tensor, " kept"]) -> Factors:
    """Select latents, in a new order. With head groups, `order` is that within each group."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (factors.groups, -1)).index_select(1, order).flatten(0, 1)

    down_bias = None if factors.down_bias is None else rows(factors.down_bias)
    return Factors(rows(factors.down), factors.up.index_select(1, order), factors.bias, down_bias)


def hadamard(size: int) -> Float[Tensor, "size size"]:
    """Return an orthogonal matrix whose entries all have the same size, for a power of two; fp64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def hadamard_blocks(size: int) -> Float[Tensor, "size size"]:
    """Return Hadamard matrices along the diagonal, the largest first, for any size; fp64."""
    matrix, start = torch.zeros(size, size, dtype=torch.float64), 0
    while start < size:
        own = 1 << (size - start).bit_length() - 1
        matrix[start : start + own, start : start + own] = hadamard(own)
        start += own
    return matrix

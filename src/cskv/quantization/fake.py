"""The grid with gradients, for quantisation-aware training.

Forward it is bit for bit what `quantise` and `dequantise` give. Backward, rounding counts as the identity (the
straight-through estimator), and all else is differentiated: with u = (x - minimum) / scale and r = q - u, x^ = x +
scale * r, where the scale is (maximum - minimum) / levels. So

    dL/dx_i = g_i + (sum_j g_j r_j) / levels * ([i is the maximum] - [i is the minimum]),

and a block's extremes have the gradient of any other value, and that of the scale besides.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.quantization.grid import Grid, block_codes, block_parameters, from_blocks, to_blocks


def read_back(latents: Float[Tensor, "batch tokens rank"], grid: Grid | None) -> Float[Tensor, "batch tokens rank"]:
    """Quantise and dequantise, differentiably: the latents as the cache reads them.

    Args:
        latents: of tokens from the first of a block on.
        grid: None stores them as they are.

    Returns:
        the dtype of the latents.
    """
    if grid is None:
        return latents
    parts = []
    for bits, channels, _ in grid.runs:
        run = latents[..., channels]
        blocks = _StraightThrough.apply(to_blocks(run.float(), grid), 2**bits - 1)
        parts.append(from_blocks(blocks, grid, run.shape))
    return torch.cat(parts, dim=-1).to(latents.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, levels: int) -> Tensor:
        scale, minimum = block_parameters(blocks, levels)
        codes = block_codes(blocks, scale, minimum, levels)
        read = minimum.float()[..., None] + scale.float()[..., None] * codes
        ctx.save_for_backward(blocks, scale, read)
        ctx.levels = levels
        return read

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        blocks, scale, read = ctx.saved_tensors
        step = scale.float()[..., None]
        residual = torch.where(step > 0, (read - blocks) / step, torch.zeros_like(blocks))
        of_scale = (grad * residual).sum(-1, keepdim=True) / ctx.levels
        grad = grad.scatter_add(-1, blocks.argmax(-1, keepdim=True), of_scale)
        return grad.scatter_add(-1, blocks.argmin(-1, keepdim=True), -of_scale), None

"""Sealing latents: by Triton kernels on a GPU where Triton is installed, by torch elsewhere. The bits are the same."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cskv.quantization import grid as by_torch
from cskv.quantization.grid import Grid, Quantised


def quantise(latents: Float[Tensor, "batch tokens rank"], grid: Grid) -> Quantised:
    """Put latents on the grid, as `cskv.quantization.grid.quantise` does."""
    if latents.is_cuda:
        from cskv.quantization.triton import launch

        if launch.installed():
            return launch.quantise(latents, grid)
    return by_torch.quantise(latents, grid)

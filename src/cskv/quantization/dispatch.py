"""Sealing latents: by two Triton kernels on a GPU where Triton is installed, by a dozen of torch's per width elsewhere.

The result is that of `cskv.quantization.grid.quantise` on the CPU, bit for bit but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.quantization import grid as by_torch
from cskv.quantization.grid import PARAMETER_DTYPE, Grid, Quantised
from cskv.quantization.packing import planes
from cskv.quantization.tables import block_table, byte_table, channel_table

BLOCKS = 128  # of a program that finds parameters
TOKENS, BYTES = 16, 64  # of a program that packs


@cache
def installed() -> bool:
    """Tell whether Triton is installed."""
    return find_spec("triton") is not None


def quantise(latents: Float[Tensor, "batch tokens rank"], grid: Grid) -> Quantised:
    """Put latents on the grid, as `cskv.quantization.grid.quantise` does."""
    if torch.compiler.is_compiling():
        bits, channels = zip(*grid.widths, strict=True)
        return Quantised(*_opaque(latents, bits, channels, grid.block_tokens, grid.block_channels))
    return by_kernels(latents, grid) if latents.is_cuda and installed() else by_torch.quantise(latents, grid)


# Compiled, the steps of `cskv.quantization.grid` would be fused without their rounding to 16 bits in between.
@torch.library.custom_op(
    "cskv::quantise",
    mutates_args=(),
    schema="(Tensor latents, int[] bits, int[] channels, int block_tokens, int block_channels) "
    "-> (Tensor, Tensor, Tensor)",
)
def _opaque(
    latents: Tensor, bits: Sequence[int], channels: Sequence[int], block_tokens: int, block_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    grid = Grid(tuple(zip(bits, channels, strict=True)), block_tokens, block_channels)
    payload, scales, minima = quantise(latents, grid)
    return payload, scales, minima


@_opaque.register_fake
def _shapes(
    latents: Tensor, bits: Sequence[int], channels: Sequence[int], block_tokens: int, block_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    grid = Grid(tuple(zip(bits, channels, strict=True)), block_tokens, block_channels)
    batch, tokens, _ = latents.shape
    blocks = batch, -(-tokens // block_tokens), grid.channel_blocks
    scales, minima = (latents.new_empty(blocks, dtype=PARAMETER_DTYPE) for _ in range(2))
    return latents.new_empty((batch, tokens, grid.row_bytes), dtype=torch.uint8), scales, minima


def by_kernels(latents: Float[Tensor, "batch tokens rank"], grid: Grid) -> Quantised:
    """Put latents on the grid with the Triton kernels."""
    from cskv.quantization.triton import kernels

    if latents.stride(2) != 1:
        latents = latents.contiguous()
    batch, tokens, _ = latents.shape
    rows, columns, row_bytes = -(-tokens // grid.block_tokens), grid.channel_blocks, grid.row_bytes
    payload = latents.new_empty(batch, tokens, row_bytes, dtype=torch.uint8)
    scales, minima = (latents.new_empty(batch, rows, columns, dtype=PARAMETER_DTYPE) for _ in range(2))
    bits = scales.view(torch.int16), minima.view(torch.int16)
    if not latents.numel():
        return Quantised(payload, scales, minima)
    strides = latents.stride(0), latents.stride(1)
    slots = 8 // min(width for bits, _ in grid.widths for width in planes(bits))
    kernels.parameters[(-(-rows * columns // BLOCKS), batch)](
        latents, *bits, block_table(grid, latents.device), tokens, rows, columns, *strides,
        BLOCK_TOKENS=grid.block_tokens, BLOCK_CHANNELS=min(grid.block_channels, grid.rank), BLOCKS=BLOCKS,
    )  # fmt: skip
    kernels.codes[(-(-tokens // TOKENS), -(-row_bytes // BYTES), batch)](
        latents, *bits, payload, byte_table(grid, latents.device), channel_table(grid, latents.device), tokens,
        row_bytes, rows, columns, *strides,
        BLOCK_TOKENS=grid.block_tokens, SLOTS=slots, TOKENS=TOKENS, BYTES=BYTES,
    )  # fmt: skip
    return Quantised(payload, scales, minima)

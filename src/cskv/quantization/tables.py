"""A grid as small integer tables on a device, so that one kernel serves every grid.

Widths, planes and ranks that are no powers of two would otherwise be branches, or kernels of their own. The tables are
made once per grid and device, not at every step. Making them copies from the host, so the first call for a grid has to
come before a CUDA graph is captured.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int32
from torch import Tensor

from cskv.quantization.grid import Grid
from cskv.quantization.packing import planes


def most_planes(grid: Grid) -> int:
    """Return the largest number of bit planes of any width: 1 for 1, 2, 4 and 8 bits, 3 for 7."""
    return max(len(planes(bits)) for bits, _ in grid.widths)


@lru_cache(maxsize=1024)
def channel_table(grid: Grid, device: torch.device) -> Int32[Tensor, "entries rank"]:
    """Build the table that unpacks every channel's code.

    Returns:
        its channel block, then for each of `most_planes` planes: the byte of a token's payload, how far to shift it
        right, the mask after that, and how far to shift the result left. A plane that a width lacks has mask 0.
    """
    columns: list[list[int]] = []
    for bits, channels, own in grid.runs:
        count, byte, left = channels.stop - channels.start, own.start, 0
        run: list[list[int]] = [[] for _ in range(count)]
        for width in planes(bits):
            size = -(-count * width // 8)
            for channel, column in enumerate(run):
                column += [byte + channel % size, channel // size * width, (1 << width) - 1, left]
            byte, left = byte + size, left + width
        columns += [column + [0] * (4 * most_planes(grid) - len(column)) for column in run]
    table = [[block, *column] for block, column in zip(grid.block_of, columns, strict=True)]
    return torch.tensor(table, dtype=torch.int32).T.contiguous().to(device)


@lru_cache(maxsize=1024)
def byte_table(grid: Grid, device: torch.device) -> Int32[Tensor, "6 row_bytes"]:
    """Build the table that packs every byte of a token's payload.

    Returns:
        its first channel, the distance to the next one, the end of the run, the width of the plane, the code's bits
        below the plane, and the largest code.
    """
    rows = []
    for bits, channels, _ in grid.runs:
        below = 0
        for width in planes(bits):
            size = -(-(channels.stop - channels.start) * width // 8)
            rows += [(channels.start + byte, size, channels.stop, width, below, 2**bits - 1) for byte in range(size)]
            below += width
    return torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device)


@lru_cache(maxsize=1024)
def block_table(grid: Grid, device: torch.device) -> Int32[Tensor, "3 channel_blocks"]:
    """Build the table of channel blocks: first channel, channels, and largest code of each."""
    rows = []
    for bits, channels, _ in grid.runs:
        for first in range(channels.start, channels.stop, grid.block_channels):
            rows.append((first, min(grid.block_channels, channels.stop - first), 2**bits - 1))
    return torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device)

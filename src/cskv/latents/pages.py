"""Latents in pages, for a server that allocates memory in blocks of tokens: their layout, and reading them.

A page holds `block_size` tokens of one layer. Every request has a row of a block table that names its pages in order,
so that token t is in page `table[t // block_size]` at `t % block_size`. Pages are bytes; key latents come first:

    plain     | k: block_size x k_rank | v: block_size x v_rank |
    packed    | k codes | v codes | k scales | k minima | v scales | v minima |

Each part begins at a multiple of 16 bytes. Pages need not be packed together in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int, Shaped, UInt8
from torch import Tensor

from cskv.errors import ConfigError
from cskv.quantization.grid import PARAMETER_DTYPE, Grid, dequantise
from cskv.scratch import Scratch

ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class PageLayout:
    """The contents of a page of one layer.

    Attributes:
        k_rank, v_rank: latents per token.
        dtype: of plain latents, and of packed ones when they are read.
        k_grid, v_grid: the grids on which they are packed; None keeps them plain.
    """

    k_rank: int
    v_rank: int
    dtype: torch.dtype
    k_grid: Grid | None = None
    v_grid: Grid | None = None

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token's latents in full blocks, padding aside."""
        parts = (self.k_rank, self.k_grid), (self.v_rank, self.v_grid)
        return (
            sum(rank * (8 * self.dtype.itemsize if grid is None else grid.bits_per_latent) for rank, grid in parts) / 8
        )

    def page_bytes(self, block_size: int) -> int:
        """Count the bytes of a page.

        Raises:
            ConfigError: blocks of the grids do not fit into the page evenly.
        """
        return sum(_aligned(rows * columns * dtype.itemsize) for dtype, rows, columns in self._parts(block_size))

    def pages(self, storage: UInt8[Tensor, "pages bytes"], block_size: int) -> tuple[Pages, Pages]:
        """View the key and the value latents in the memory of all pages."""
        views, start = [], 0
        for dtype, rows, columns in self._parts(block_size):
            stop = start + rows * columns * dtype.itemsize
            views.append(storage[:, start:stop].view(dtype).unflatten(1, (rows, columns)))
            start = _aligned(stop)
        k, v, *parameters = views
        of_keys = 0 if self.k_grid is None else 2
        return (
            Pages(k, self.dtype, self.k_grid, *parameters[:of_keys]),
            Pages(v, self.dtype, self.v_grid, *parameters[of_keys:]),
        )

    def _parts(self, block_size: int) -> list[tuple[torch.dtype, int, int]]:
        """List dtype, rows and columns: of both latents, or their codes, then of scales and minima of packed ones."""
        latents, parameters = [], []
        for rank, grid in ((self.k_rank, self.k_grid), (self.v_rank, self.v_grid)):
            if grid is None:
                latents.append((self.dtype, block_size, rank))
                continue
            if block_size % grid.block_tokens:
                raise ConfigError(
                    f"a page of {block_size} tokens cannot hold groups of {grid.block_tokens}: give a block size that "
                    "is a multiple of the group"
                )
            latents.append((torch.uint8, block_size, grid.row_bytes))
            parameters += [(PARAMETER_DTYPE, block_size // grid.block_tokens, grid.channel_blocks)] * 2
        return latents + parameters


@dataclass(frozen=True)
class Pages:
    """The latents of keys or values in all pages of a layer.

    Attributes:
        data: plain latents, or codes of packed ones.
        dtype: of the latents when they are read.
        grid: None for plain latents.
        scales, minima: of the blocks of the grid; None for plain latents.
    """

    data: Shaped[Tensor, "pages block_size row"]
    dtype: torch.dtype
    grid: Grid | None = None
    scales: BFloat16[Tensor, "pages token_blocks channel_blocks"] | None = None
    minima: BFloat16[Tensor, "pages token_blocks channel_blocks"] | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self.data.shape[1]

    @property
    def rank(self) -> int:
        """Latents per token."""
        return self.data.shape[2] if self.grid is None else self.grid.rank


@dataclass(frozen=True)
class PagedLatents:
    """The latents of some requests, read through a block table (see `cskv.latents.view.Latents`).

    Attributes:
        pages: of all requests.
        table: the block table: each request's pages in order, for `length` tokens. Entries past the last are arbitrary.
        lengths: tokens of each request.
        length, least: an upper bound on the lengths, and a lower one, such as 0. Sizes follow from them, so that the
            host need not wait for the device to learn the lengths.
    """

    pages: Pages
    table: Int[Tensor, "batch blocks"]
    lengths: Int[Tensor, " batch"]
    length: int
    least: int = 0

    def __post_init__(self) -> None:
        if self.table.shape[1] * self.pages.block_size < self.length:
            raise ValueError(
                f"a table of {self.table.shape[1]} pages of {self.pages.block_size} tokens holds no {self.length}"
            )

    @property
    def rank(self) -> int:
        return self.pages.rank

    @property
    def granularity(self) -> int:
        return self.pages.block_size

    @property
    def dtype(self) -> torch.dtype:
        """Of latents when they are read."""
        return self.pages.dtype

    def read(
        self, start: int = 0, stop: int | None = None, scratch: Scratch | None = None
    ) -> Float[Tensor, "batch tokens rank"]:
        """Read a range of tokens; zeros where a request has no such token."""
        scratch = Scratch() if scratch is None else scratch
        stop = max(start, self.length if stop is None else min(stop, self.length))
        size, grid = self.pages.block_size, self.pages.grid
        first = start // size
        names = self.table[:, first : -(-stop // size)]
        latents = self._gathered(self.pages.data, names, scratch, "pages")
        if grid is not None:
            scales, minima = (
                self._gathered(part, names, scratch, name)  # type: ignore[arg-type]
                for part, name in ((self.pages.scales, "page scales"), (self.pages.minima, "page minima"))
            )
            latents = dequantise(latents, scales, minima, grid, None, self.dtype, scratch)
        latents = latents[:, start - first * size : stop - first * size]
        if stop > self.least:  # what lies there was never written, or by another request: it may be NaN
            token = torch.arange(start, stop, device=latents.device)
            latents.masked_fill_((token >= self.lengths[:, None])[..., None], 0)
        return latents

    def _gathered(self, part: Tensor, names: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Gather the named pages of every request: (batch, blocks * rows, columns)."""
        shape = (names.numel(), *part.shape[1:])
        out = scratch.take(name, shape, part.dtype, part.device)
        torch.index_select(part, 0, names.flatten(), out=out)
        return out.view(names.shape[0], names.shape[1] * part.shape[1], part.shape[2])


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

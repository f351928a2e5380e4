"""Stores of the latents of sealed tokens: plain, or packed on a grid. Both are appended to, cropped and viewed.

Packed blocks are written once and never touched again. A crop may cut the last block short: its codes, minimum and
scale stay, and the tokens that follow begin a block of their own, which ends where the cut one would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.cache.buffer import TokenBuffer, grown
from cskv.latents.view import Latents, PackedLatents, PlainLatents
from cskv.quantization.dispatch import quantise
from cskv.quantization.grid import PARAMETER_DTYPE, Grid

GPU_ROW_BYTES = 32  # a sector of memory: rows of any rank are loaded 16 bytes at a time, and in whole sectors
GPU_CODES_BYTES = 16  # of packed ones and of their parameters, which are shorter: whole sectors would cost too much


@dataclass(frozen=True)
class LatentBytes:
    """Allocated bytes.

    Attributes:
        payload: latents, or their codes.
        scales, minima: of the blocks of packed latents. Where a crop cut a block short, the scales count the index that
            says which block each token is in.
        slack: spare capacity.
    """

    payload: int = 0
    scales: int = 0
    minima: int = 0
    slack: int = 0

    def __add__(self, other: LatentBytes) -> LatentBytes:
        return LatentBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        return sum(astuple(self))


@runtime_checkable
class LatentStore(Protocol):
    """Latents of the tokens from the first on."""

    @property
    def length(self) -> int:
        """Tokens held."""

    @property
    def batch(self) -> int:
        """Sequences held; 0 when empty."""

    def append(self, latents: Float[Tensor, "batch new rank"]) -> None:
        """Append tokens."""

    def put(self, row: int, start: int, latents: Float[Tensor, "new rank"], batch: int) -> None:
        """Write tokens of one row of `batch`, from `start` on. Blocks begin at multiples of their tokens."""

    def view(self, length: int) -> Latents:
        """View the first `length` tokens, at least one."""

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""

    def clear(self) -> None:
        """Forget everything, storage included."""

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (reorder, repeat, select along dimension 0, or move) to every tensor held."""

    def nbytes(self) -> LatentBytes:
        """Count the bytes really allocated."""


class PlainStore:
    """Latents in the dtype in which they come.

    Args:
        capacity: tokens to preallocate.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._tokens = TokenBuffer(capacity, GPU_ROW_BYTES)

    @property
    def length(self) -> int:
        return self._tokens.length

    @property
    def batch(self) -> int:
        return self._tokens.tokens.shape[0] if self.length else 0

    def append(self, latents: Float[Tensor, "batch new rank"]) -> None:
        self._tokens.append(latents)

    def put(self, row: int, start: int, latents: Float[Tensor, "new rank"], batch: int) -> None:
        self._tokens.put(row, start, latents, batch)

    def view(self, length: int) -> PlainLatents:
        return PlainLatents(self._tokens.tokens[:, :length], self._tokens.padding)

    def crop(self, length: int) -> None:
        self._tokens.crop(length)

    def clear(self) -> None:
        self._tokens.clear()

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._tokens.map_batch(change)

    def nbytes(self) -> LatentBytes:
        slack = self._tokens.slack_nbytes()
        return LatentBytes(payload=self._tokens.nbytes() - slack, slack=slack)


class PackedStore:
    """Latents as codes of a few bits, with a minimum and a scale per block.

    Args:
        grid: widths and blocks.
        capacity: tokens to preallocate.
    """

    def __init__(self, grid: Grid, capacity: int = 0) -> None:
        self.grid = grid
        blocks = -(-capacity // grid.block_tokens)
        self._payload = TokenBuffer(capacity, GPU_CODES_BYTES)
        self._scales, self._minima = TokenBuffer(blocks, GPU_CODES_BYTES), TokenBuffer(blocks, GPU_CODES_BYTES)
        self._cuts: list[int] = []  # tokens that begin a block in the middle of one that a crop has cut short
        self._rows: Tensor | None = None
        self._dtype = torch.float32

    @property
    def length(self) -> int:
        return self._payload.length

    @property
    def batch(self) -> int:
        return self._payload.tokens.shape[0] if self.length else 0

    def append(self, latents: Float[Tensor, "batch new rank"]) -> None:
        self._dtype, self._rows = latents.dtype, None
        to_boundary = -self.length % self.grid.block_tokens  # not 0 only after a crop
        if to_boundary and latents.shape[1]:
            self._cuts.append(self.length)
        for part in (latents[:, :to_boundary], latents[:, to_boundary:]):
            if part.shape[1]:
                quantised = quantise(part, self.grid)
                self._payload.append(quantised.payload)
                self._scales.append(quantised.scales)
                self._minima.append(quantised.minima)

    def put(self, row: int, start: int, latents: Float[Tensor, "new rank"], batch: int) -> None:
        self._dtype, size = latents.dtype, self.grid.block_tokens
        to_boundary = -start % size  # not 0 only after a crop
        for part, place in ((latents[:to_boundary], start), (latents[to_boundary:], start + to_boundary)):
            if part.shape[0]:
                quantised = quantise(part[None], self.grid)
                self._payload.put(row, place, quantised.payload[0], batch)
                self._scales.put(row, place // size, quantised.scales[0], batch)
                self._minima.put(row, place // size, quantised.minima[0], batch)

    def view(self, length: int) -> PackedLatents:
        payload, scales, minima = (buffer.tokens for buffer in (self._payload, self._scales, self._minima))
        return PackedLatents(payload[:, :length], scales, minima, self.grid, self._dtype, self._token_block(length))

    def _token_block(self, length: int) -> Tensor | None:
        """Return the row of blocks of every token, where a block was cut short. Made anew after an append or a crop."""
        if not self._cuts:
            return None
        if self._rows is None:
            tokens = torch.arange(self.length, device=self._payload.tokens.device)
            cuts = torch.tensor(self._cuts, device=tokens.device)
            self._rows = tokens // self.grid.block_tokens + torch.bucketize(tokens, cuts, right=True)
        return self._rows[:length]

    def crop(self, length: int) -> None:
        self._payload.crop(length)
        self._rows = None
        while self._cuts and self._cuts[-1] >= length:
            self._cuts.pop()
        blocks = -(-self.length // self.grid.block_tokens) + len(self._cuts)
        self._scales.crop(blocks)
        self._minima.crop(blocks)

    def clear(self) -> None:
        for buffer in (self._payload, self._scales, self._minima):
            buffer.clear()
        self._cuts, self._rows = [], None

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for buffer in (self._payload, self._scales, self._minima):
            buffer.map_batch(change)
        self._rows = None  # it may have been moved

    def nbytes(self) -> LatentBytes:
        slacks = [buffer.slack_nbytes() for buffer in (self._payload, self._scales, self._minima)]
        sizes = [buffer.nbytes() for buffer in (self._payload, self._scales, self._minima)]
        payload, scales, minima = (size - slack for size, slack in zip(sizes, slacks, strict=True))
        rows = 0 if self._rows is None else self._rows.untyped_storage().nbytes()
        return LatentBytes(payload, scales + rows, minima, sum(slacks))


def latent_store(grid: Grid | None, capacity: int = 0) -> LatentStore:
    """Return an empty store: packed on the grid, or plain without one."""
    return PlainStore(capacity) if grid is None else PackedStore(grid, capacity)


def bytes_of_filled(tokens: int, rank: int, dtype: torch.dtype, grid: Grid | None = None) -> LatentBytes:
    """Compute the bytes of a store that `tokens` of one sequence were appended to at once, without making it.

    Args:
        tokens: any number.
        rank: latents per token.
        dtype: of plain latents.
        grid: on which they are packed; None for plain ones.
    """
    if not tokens:
        return LatentBytes()
    row = rank * dtype.itemsize if grid is None else grid.row_bytes
    payload, slack, parameters = tokens * row, (grown(tokens) - tokens) * row, 0
    if grid is not None:
        blocks, size = -(-tokens // grid.block_tokens), grid.channel_blocks * PARAMETER_DTYPE.itemsize
        parameters, slack = blocks * size, slack + 2 * (grown(blocks) - blocks) * size
    return LatentBytes(payload, parameters, parameters, slack)

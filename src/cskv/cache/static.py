"""The bi-branch store of one layer in memory of fixed size: every tensor is made once, and stays where it is.

    exact     sinks | the newest `window + group` tokens, a ring: a token's slot is its number modulo that
    latents   of every token behind the sinks, at its place, from when it comes

Which latents are read is a matter of numbers on the device (`cskv.cache.clock`): sealing, in the same whole groups as
in `cskv.cache.bibranch`, moves nothing. Where blocks of a grid span several tokens, those of the block under way wait,
and the block is packed at every step until it is complete; nobody reads it before.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.cache.clock import Clock, fixed
from cskv.cache.latents import GPU_ROW_BYTES, LatentBytes
from cskv.errors import CacheError
from cskv.latents.pages import PagedLatents, Pages
from cskv.latents.view import Latents, PackedLatents, PlainLatents, View
from cskv.quantization.dispatch import quantise
from cskv.quantization.grid import PARAMETER_DTYPE, Grid, Quantised

PAGE = 64  # tokens, at least: kernels read latents through a table of pages
Grids = tuple[Grid | None, Grid | None]


class StaticLatents:
    """Latents of keys or values, of every token from the first place on.

    Args:
        batch: rows.
        capacity: tokens of each, a multiple of `page`.
        page: tokens of a page, a multiple of those of a block of the grid.
        like: latents, (batch, new, rank): of the rank, dtype and device of those to come.
        grid: on which they are packed; None keeps them as they come.
    """

    def __init__(self, batch: int, capacity: int, page: int, like: Tensor, grid: Grid | None) -> None:
        self.grid, self.rank, self.dtype = grid, like.shape[2], like.dtype
        self._page, self._block = page, 1 if grid is None else grid.block_tokens
        width, dtype = self.rank, self.dtype
        if grid is not None:
            width, dtype = grid.row_bytes, torch.uint8
        elif like.is_cuda:
            width += -width % (GPU_ROW_BYTES // dtype.itemsize)
        self._data = fixed((batch, capacity, width), dtype, like.device)
        self._scales = self._minima = self._waiting = None
        if grid is not None:
            blocks = batch, capacity // self._block, grid.channel_blocks
            self._scales, self._minima = (fixed(blocks, PARAMETER_DTYPE, like.device) for _ in range(2))
        if self.is_grouped:
            self._waiting = fixed((batch, self._block, self.rank), self.dtype, like.device)

    @property
    def is_grouped(self) -> bool:
        """Whether tokens are packed together."""
        return self._block > 1

    def write(self, clock: Clock, latents: Float[Tensor, "batch rank"]) -> None:
        """Write one token of every row, at its place, and pack the block that it is in if the clock says so."""
        row, place = clock.row, clock.place
        if self._waiting is None:
            self._put(row, place[:, None], latents[:, None])
            return
        self._waiting[row, place % self._block] = latents
        if clock.packs:
            first = (place // self._block * self._block)[:, None]
            self._put(row, first + torch.arange(self._block, device=place.device), self._waiting)

    def put(self, rows: slice, start: int, latents: Float[Tensor, "rows new rank"]) -> None:
        """Write the next tokens of some rows, from a place on that the host knows."""
        if self._waiting is not None:
            waiting = start % self._block
            latents = torch.cat([self._waiting[rows, :waiting], latents], dim=1)
            start, whole = start - waiting, latents.shape[1] // self._block * self._block
            self._waiting[rows, : latents.shape[1] - whole] = latents[:, whole:]
            latents = latents[:, :whole]
        stop = start + latents.shape[1]
        if stop == start:
            return
        if self.grid is None:
            self._data[rows, start:stop, : self.rank] = latents
            return
        packed, blocks = quantise(latents, self.grid), slice(start // self._block, stop // self._block)
        self._data[rows, start:stop] = packed.payload
        self._scales[rows, blocks], self._minima[rows, blocks] = packed.scales, packed.minima  # type: ignore[index]

    def pages(self, table: Tensor, lengths: Tensor, most: int) -> PagedLatents:
        """View the first tokens of every row, as many as there are numbers on the device for."""
        data = self._data.view(-1, self._page, self._data.shape[2])
        if self.grid is None:
            return PagedLatents(Pages(data[..., : self.rank], self.dtype), table, lengths, most)
        blocks = (-1, self._page // self._block, self.grid.channel_blocks)
        scales, minima = self._scales.view(blocks), self._minima.view(blocks)  # type: ignore[union-attr]
        return PagedLatents(Pages(data, self.dtype, self.grid, scales, minima), table, lengths, most)

    def first(self, length: int) -> Latents:
        """View the first tokens of all rows, at least one."""
        if self.grid is None:
            return PlainLatents(self._data[:, :length, : self.rank])
        blocks = -(-length // self._block)
        scales, minima = self._scales[:, :blocks], self._minima[:, :blocks]  # type: ignore[index]
        return PackedLatents(self._data[:, :length], scales, minima, self.grid, self.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """List everything held."""
        return tuple(part for part in (self._data, self._scales, self._minima, self._waiting) if part is not None)

    def nbytes(self, tokens: int) -> LatentBytes:
        """Count the bytes allocated, of which so many tokens of all rows are read; the others are slack."""
        total = sum(part.untyped_storage().nbytes() for part in self.tensors())
        if self.grid is None:
            payload, parameters = tokens * self.rank * self.dtype.itemsize, 0
        else:
            payload = tokens * self.grid.row_bytes
            parameters = tokens // self._block * self.grid.channel_blocks * PARAMETER_DTYPE.itemsize
        return LatentBytes(payload, parameters, parameters, total - payload - 2 * parameters)

    def _put(self, row: Tensor, places: Tensor, latents: Tensor) -> None:
        """Write tokens that are a block, or one token each: (batch, tokens) of places."""
        index = row[:, None], places
        if self.grid is None:
            self._data[..., : self.rank][index] = latents
            return
        packed: Quantised = quantise(latents, self.grid)
        self._data[index] = packed.payload
        block = places[:, :1] // self._block
        self._scales[row[:, None], block] = packed.scales  # type: ignore[index]
        self._minima[row[:, None], block] = packed.minima  # type: ignore[index]


class StaticStore:
    """Latents of all tokens behind the sinks, and the exact sinks and newest tokens, of one layer.

    Args:
        clock: of the cache. It is told of a forward before its layers' stores are.
        grids: on which key and value latents are packed, or None each.
    """

    def __init__(self, clock: Clock, grids: Grids) -> None:
        self.clock, self.grids = clock, grids
        self.is_allocated = False

    def allocate(self, latents: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Allocate for rows like those of a first forward.

        Args:
            latents: (batch, new, rank) of keys and values.
            keys, values: (batch, kv_heads, new, head_dim).
        """
        clock, (batch, kv_heads, _, _) = self.clock, keys.shape
        if keys.device != clock.columns.device:
            raise CacheError(
                f"a static compressed cache lies on one device, and this model's layers are on {clock.columns.device} "
                f"and {keys.device}; use the default dynamic cache"
            )
        block = math.lcm(*(grid.block_tokens for grid in self.grids if grid is not None))
        page = -(-PAGE // block) * block
        pages = max(1, -(-(clock.capacity - clock.sinks) // page))
        self._k, self._v = (
            StaticLatents(batch, pages * page, page, like, grid) for like, grid in zip(latents, self.grids, strict=True)
        )
        self._keys = fixed((batch, kv_heads, clock.slots, keys.shape[3]), keys.dtype, keys.device)
        self._values = fixed((batch, kv_heads, clock.slots, values.shape[3]), values.dtype, values.device)
        self._table = fixed((batch, pages), torch.int32, keys.device)
        self._table.copy_(torch.arange(batch * pages, device=keys.device).view(batch, pages))
        self.is_allocated = True

    @property
    def blocks(self) -> tuple[int, ...]:
        """The tokens of the blocks that are packed together, of keys and of values, where they are."""
        return tuple(grid.block_tokens for grid in self.grids if grid is not None and grid.block_tokens > 1)

    def append(
        self,
        k_latents: Float[Tensor, "batch 1 k_rank"],
        v_latents: Float[Tensor, "batch 1 v_rank"],
        keys: Float[Tensor, "batch kv_heads 1 head_dim"],
        values: Float[Tensor, "batch kv_heads 1 head_dim"],
    ) -> View:
        """Append one token to every row and return what its query reads, without waiting for the device."""
        clock = self.clock
        self._keys[clock.row, :, clock.slot] = keys[:, :, 0]
        self._values[clock.row, :, clock.slot] = values[:, :, 0]
        view = View(self._keys, self._values, exists=clock.exists, sinks=clock.sinks)
        if not clock.most:
            return view
        self._k.write(clock, k_latents[:, 0])
        self._v.write(clock, v_latents[:, 0])
        k, v = (part.pages(self._table, clock.sealed, clock.most) for part in (self._k, self._v))
        return View(self._keys, self._values, k, v, clock.exists, clock.sinks)

    def extend(
        self,
        k_latents: Float[Tensor, "batch new k_rank"],
        v_latents: Float[Tensor, "batch new v_rank"],
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
    ) -> View:
        """Append several columns and return what their queries read, as `BiBranchStore.append` would."""
        view = self._before(keys, values)
        row_by_row = [(slice(row, row + 1), count) for row, count in enumerate(self.clock.leading)]
        for rows, missing in row_by_row or [(slice(None), 0)]:
            own = (part[rows, :, missing:] for part in (keys, values))
            latents = (part[rows, missing:] for part in (k_latents, v_latents))
            self._fill(rows, *own, *latents)
        return view

    def reorder(self, rows: Tensor) -> None:
        """Take the rows of an index, (batch,)."""
        for part in self.tensors():
            part.copy_(part[rows])

    def tensors(self) -> tuple[Tensor, ...]:
        """List everything held that belongs to rows."""
        return (self._keys, self._values, *self._k.tensors(), *self._v.tensors()) if self.is_allocated else ()

    @property
    def length(self) -> int:
        """Columns held. It waits for the device."""
        return int(self.clock.columns) if self.clock.batch else 0

    @property
    def batch(self) -> int:
        """Sequences held; 0 before the first forward."""
        return self.clock.batch

    def latent_nbytes(self) -> LatentBytes:
        """Count the bytes of latents: those of sealed tokens, and slack."""
        if not self.is_allocated:
            return LatentBytes()
        sealed = sum(map(self.clock.due, self.clock.lengths()))
        table = LatentBytes(slack=self._table.untyped_storage().nbytes())
        return self._k.nbytes(sealed) + self._v.nbytes(sealed) + table

    def window_nbytes(self) -> int:
        """Count the bytes of exact keys and values."""
        return sum(part.untyped_storage().nbytes() for part in (self._keys, self._values)) if self.is_allocated else 0

    def _before(self, keys: Tensor, values: Tensor) -> View:
        """View what is held, and new keys and values behind it."""
        clock, before = self.clock, self.clock.before
        if not before:
            return View(keys, values)
        sealed = clock.due(before)
        sinks = min(before, clock.sinks)
        index = torch.arange(clock.sinks + sealed, max(before, clock.sinks + sealed), device=keys.device)
        index = torch.cat([torch.arange(sinks, device=keys.device), clock.slots_of(index)])
        keys = torch.cat([self._keys[:, :, index], keys], dim=2)
        values = torch.cat([self._values[:, :, index], values], dim=2)
        if not sealed:
            return View(keys, values, sinks=clock.sinks)
        return View(keys, values, self._k.first(sealed), self._v.first(sealed), sinks=clock.sinks)

    def _fill(self, rows: slice, keys: Tensor, values: Tensor, k_latents: Tensor, v_latents: Tensor) -> None:
        """Write the next tokens of rows that all have as many."""
        clock, first, new = self.clock, self.clock.before, keys.shape[2]
        sinks = max(0, min(new, clock.sinks - first))  # of the new ones
        newest = max(sinks, new - clock.newest)
        kept = [*range(sinks), *range(newest, new)]
        index = torch.tensor(kept, device=keys.device, dtype=torch.int64)
        slot = clock.slots_of(index + first)
        self._keys[rows, :, slot] = keys[:, :, index]
        self._values[rows, :, slot] = values[:, :, index]
        if clock.most:
            place = max(0, first - clock.sinks)
            self._k.put(rows, place, k_latents[:, sinks:])
            self._v.put(rows, place, v_latents[:, sinks:])

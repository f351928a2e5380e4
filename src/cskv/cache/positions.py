"""Where the sealed keys stand: what RoPE needs to rotate rebuilt keys, kept once for all layers of a cache.

Position numbers are enough (4 bytes a token) when the model's rotary embedding is a fixed function of them. Where it
depends on the length of the sequence (dynamic and longrope scaling), cos and sin are kept as they were when the key was
written, since that is what the uncompressed cache holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cskv.cache.buffer import TokenBuffer

POSITION_DTYPE = torch.int32


class PositionTable:
    """Positions, or cos and sin, of every cached token.

    The layers of one cache share a table. Only its owner, the first compressed layer, appends to it and crops, reorders
    or moves it, so that each change happens once.

    Args:
        capacity: tokens to preallocate.

    Attributes:
        epoch: counts the changes to tokens that were read already: what was made of them is no longer right.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._capacity = capacity
        self._buffers: list[TokenBuffer] = []
        self._read = 0
        self.epoch = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._buffers[0].length if self._buffers else 0

    def append(self, rows: tuple[Tensor, ...]) -> None:
        """Append one tensor (positions: (batch or 1, new)) or two (cos, sin: (batch or 1, new, rotary_dim))."""
        if not self._buffers:
            self._buffers = [TokenBuffer(self._capacity) for _ in rows]
        for buffer, row in zip(self._buffers, rows, strict=True):
            row = row.to(POSITION_DTYPE)[..., None] if not row.is_floating_point() else row
            if buffer.length and buffer.tokens.shape[0] != row.shape[0]:
                row = self._match_batch(buffer, row)
            buffer.append(row)

    def read(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return the tokens of a range, in the form in which they were appended (positions as int64)."""
        if not torch.compiler.is_compiling():
            self._read = max(self._read, stop)
        rows = (buffer.tokens[:, start:stop] for buffer in self._buffers)
        return tuple(row if row.is_floating_point() else row[..., 0].long() for row in rows)

    def at(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Return tokens of each row, (batch, tokens) of columns, likewise; of those below 0 it returns any."""
        columns = columns.clamp(min=0)
        found = []
        for row in self.read(0, self.length):
            index = columns if row.ndim == 2 else columns[..., None].expand(-1, -1, row.shape[2])
            found.append(row.expand(columns.shape[0], *row.shape[1:]).gather(1, index))
        return tuple(found)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        for buffer in self._buffers:
            buffer.crop(length)
        if length < self._read:
            self._changed()

    def clear(self) -> None:
        """Forget everything."""
        self._buffers = []
        self._changed()

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` along the batch, unless all rows share one entry."""
        for buffer in self._buffers:
            if buffer.length and buffer.tokens.shape[0] > 1:
                buffer.map_batch(change)
                self._changed()

    def nbytes(self) -> int:
        """Count the bytes really allocated."""
        return sum(buffer.nbytes() for buffer in self._buffers)

    def _match_batch(self, buffer: TokenBuffer, row: Tensor) -> Tensor:
        """Bring held and new rows to one batch size where one of them is shared by all (batch 1)."""
        held = buffer.tokens.shape[0]
        if row.shape[0] == 1:
            return row.expand(held, *row.shape[1:])
        if held != 1:
            raise RuntimeError(f"positions of batch {row.shape[0]} cannot follow those of batch {held}")
        buffer.map_batch(lambda storage: storage.repeat(row.shape[0], 1, 1))
        self._changed()
        return row

    def _changed(self) -> None:
        self._read, self.epoch = 0, self.epoch + 1

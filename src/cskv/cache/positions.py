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


class PositionTable:
    """Positions, or cos and sin, of every cached token.

    The layers of one cache share a table. Only its owner, the first compressed layer, appends to it and crops, reorders
    or moves it, so that each change happens once.

    Args:
        room: tokens that there is room for from the start.
    """

    def __init__(self, room: int = 0) -> None:
        self._room = room
        self._buffers: list[TokenBuffer] = []

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._buffers[0].length if self._buffers else 0

    def append(self, rows: tuple[Tensor, ...]) -> None:
        """Append one tensor (positions: (batch or 1, new)) or two (cos, sin: (batch or 1, new, rotary_dim))."""
        if not self._buffers:
            self._buffers = [TokenBuffer(self._room) for _ in rows]
        for buffer, row in zip(self._buffers, rows, strict=True):
            row = row.to(torch.int32)[..., None] if not row.is_floating_point() else row
            if buffer.length and buffer.tokens.shape[0] != row.shape[0]:
                row = _match_batch(buffer, row)
            buffer.append(row)

    def read(self, length: int) -> tuple[Tensor, ...]:
        """The first `length` tokens, in the form in which they were appended (positions as int64)."""
        rows = (buffer.tokens[:, :length] for buffer in self._buffers)
        return tuple(row if row.is_floating_point() else row[..., 0].long() for row in rows)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        for buffer in self._buffers:
            buffer.crop(length)

    def clear(self) -> None:
        """Forget everything."""
        self._buffers = []

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` along the batch, unless all rows share one entry."""
        for buffer in self._buffers:
            if buffer.length and buffer.tokens.shape[0] > 1:
                buffer.map_batch(change)

    def nbytes(self) -> int:
        """Bytes really allocated."""
        return sum(buffer.nbytes() for buffer in self._buffers)


def _match_batch(buffer: TokenBuffer, row: Tensor) -> Tensor:
    """Bring held and new rows to one batch size where one of them is shared by all (batch 1)."""
    held = buffer.tokens.shape[0]
    if row.shape[0] == 1:
        return row.expand(held, *row.shape[1:])
    if held != 1:
        raise RuntimeError(f"positions of batch {row.shape[0]} cannot follow those of batch {held}")
    buffer.map_batch(lambda storage: storage.repeat(row.shape[0], 1, 1))
    return row

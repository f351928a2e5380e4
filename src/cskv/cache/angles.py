"""Cos and sin of the tokens behind the sinks, in memory of fixed size, kept once for all layers of a static cache."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cskv.cache.clock import Clock, fixed
from cskv.errors import CacheError


class AngleTable:
    """Cos and sin as they were when the keys were written, 2 * rotary_dim numbers a token.

    Args:
        clock: of the cache.

    Attributes:
        cos, sin: (batch or 1, capacity - sinks, rotary_dim): of every token behind the sinks, at its place.
    """

    cos: Float[Tensor, "rows places rotary_dim"]
    sin: Float[Tensor, "rows places rotary_dim"]

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows = 0

    def allocate(self, cos: Float[Tensor, "rows new rotary_dim"], like: Tensor) -> None:
        """Allocate for rows like those of a first forward, in the dtype of `like`.

        Rows of one length that are given one cos and sin share them in the table as well.
        """
        self.rows = self.clock.batch if self.clock.padded else cos.shape[0]
        shape = (self.rows, max(1, self.clock.capacity - self.clock.sinks), cos.shape[2])
        self.cos, self.sin = (fixed(shape, like.dtype, like.device) for _ in range(2))

    def append(self, cos: Float[Tensor, "rows 1 rotary_dim"], sin: Float[Tensor, "rows 1 rotary_dim"]) -> None:
        """Write those of one token of every row."""
        place = self.clock.place[: self.rows, None, None].expand(-1, 1, cos.shape[2])
        for table, own in ((self.cos, cos), (self.sin, sin)):
            table.scatter_(1, place, self._of_rows(own).to(table.dtype))

    def extend(self, cos: Float[Tensor, "rows new rotary_dim"], sin: Float[Tensor, "rows new rotary_dim"]) -> None:
        """Write those of several columns."""
        before, sinks, leading = self.clock.before, self.clock.sinks, self.clock.leading
        place, skipped = max(0, before - sinks), max(0, sinks - before)
        for table, own in ((self.cos, cos), (self.sin, sin)):
            for row, rows in enumerate(self._of_rows(own)):
                new = rows[(leading[row] if leading else 0) + skipped :]
                table[row, place : place + new.shape[0]] = new.to(table.dtype)

    def reorder(self, rows: Tensor) -> None:
        """Take the rows of an index, (batch,)."""
        if self.rows > 1:
            for table in (self.cos, self.sin):
                table.copy_(table[rows])

    def nbytes(self) -> int:
        """Count the bytes allocated."""
        return sum(part.untyped_storage().nbytes() for part in (self.cos, self.sin)) if self.rows else 0

    def _of_rows(self, part: Tensor) -> Tensor:
        if part.shape[0] not in (1, self.rows):
            raise CacheError(
                f"the forward has position embeddings of {part.shape[0]} rows, and the first one had one for all; give "
                "every forward on this static cache position_ids of (batch, tokens), or none"
            )
        return part.expand(self.rows, -1, -1)

"""Where the tokens of rows of different padding lie: in the model's columns, and in the two branches of a cache.

A batch that is padded on the left has columns that are no tokens of some rows. The rows of its cache are aligned at
their first real token instead, so that every row is cut into sinks, sealed groups and recent tokens as it would be
alone:

    model's columns        padding | sinks | sealed | recent
    sealed branch          sealed tokens at their places | nothing
    exact branch           sinks | recent | nothing

All of this is arithmetic on the host, without a tensor: it is the same for all layers of a model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]  # (batch, tokens); -1 where a row has none


class Row(NamedTuple):
    """One sequence of a batch.

    Attributes:
        padding: columns before its first real token.
        sealed: real tokens in the sealed branch; they follow the sinks.
        cuts: sealed tokens, counted from the first sealed one, that begin a block of their own, since a crop cut the
            one before it short. The unused places of that block stay empty.
    """

    padding: int
    sealed: int = 0
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The rows of a padded batch.

    Attributes:
        rows: one per sequence.
        length: columns of the model, padding included.
        sinks: real tokens at the start of every row that are never sealed.
        align: tokens of the blocks that latents are packed in; a sealed token's place is its number modulo this.
    """

    rows: tuple[Row, ...]
    length: int
    sinks: int
    align: int = 1

    def real(self, row: Row) -> int:
        """Count the tokens of a row."""
        return self.length - row.padding

    def exact(self, row: Row) -> int:
        """Count the tokens of a row in the exact branch."""
        return self.real(row) - row.sealed

    def waiting(self, row: Row) -> int:
        """Count the recent tokens of a row: those that will be sealed."""
        return max(0, self.exact(row) - self.sinks)

    @property
    def places(self) -> int:
        """Count the places of the sealed branch."""
        return max((self._place(row, row.sealed - 1) + 1 for row in self.rows if row.sealed), default=0)

    def sealed_columns(self) -> Index:
        """Return the column of each place of the sealed branch."""
        columns = np.full((len(self.rows), self.places), -1)
        for own, row in zip(columns, self.rows, strict=True):
            for start, stop in zip((0, *row.cuts), (*row.cuts, row.sealed), strict=True):
                place = self._place(row, start)
                own[place : place + stop - start] = row.padding + self.sinks + np.arange(start, stop)
        return columns

    def exact_columns(self) -> Index:
        """Return the column of each token of the exact branch."""
        return _aligned(
            row.padding + token + row.sealed * (token >= self.sinks)
            for row in self.rows
            for token in (np.arange(self.exact(row)),)
        )

    def appended(self, widths: tuple[int, int], new: int, padding: Sequence[int]) -> tuple[Layout, Index, Index]:
        """Append columns.

        Args:
            widths: of the tensors that hold the exact branch and the waiting latents; new ones are put behind these.
            new: columns.
            padding: how many of them, the first ones, are no tokens of each row.

        Returns:
            the layout after it, which of held and new tokens its exact branch has, and which of their latents wait.
        """
        after = replace(
            self,
            rows=tuple(row._replace(padding=row.padding + more) for row, more in zip(self.rows, padding, strict=True)),
            length=self.length + new,
        )
        held, waiting = widths
        pairs = list(zip(self.rows, padding, strict=True))
        exact = _aligned(_runs((0, self.exact(row)), (held + more, held + new)) for row, more in pairs)
        latents = _aligned(
            _runs((0, self.waiting(row)), (waiting + more + self._missing_sinks(row), waiting + new))
            for row, more in pairs
        )
        return after, exact, latents

    def sealing(self, counts: Sequence[int]) -> tuple[Layout, Index, Index]:
        """Seal the next so many tokens of each row.

        Returns:
            the layout after it, and which tokens stay in the exact branch, and which of the waiting latents.
        """
        pairs = list(zip(self.rows, counts, strict=True))
        after = replace(self, rows=tuple(self._sealed(row, count) for row, count in pairs))
        exact = _aligned(
            _runs((0, min(self.sinks, self.exact(row))), (self.sinks + count, self.exact(row))) for row, count in pairs
        )
        return after, exact, _aligned(np.arange(count, self.waiting(row)) for row, count in pairs)

    def cropped(self, length: int) -> Layout:
        """Forget the columns from `length` on."""
        return replace(self, rows=tuple(self._cropped(row, length) for row in self.rows), length=length)

    def first_place(self, row: Row, count: int) -> int:
        """Return where the last `count` sealed tokens of a row begin, which were sealed together."""
        return self._place(row, row.sealed - count)

    def _place(self, row: Row, token: int) -> int:
        return token + self.align * bisect_right(row.cuts, token)

    def _missing_sinks(self, row: Row) -> int:
        return max(0, self.sinks - self.real(row))

    def _sealed(self, row: Row, count: int) -> Row:
        cut = (row.sealed,) if count and row.sealed % self.align else ()
        return Row(row.padding, row.sealed + count, row.cuts + cut)

    def _cropped(self, row: Row, length: int) -> Row:
        sealed = min(row.sealed, max(0, length - row.padding - self.sinks))
        return Row(min(row.padding, length), sealed, tuple(cut for cut in row.cuts if cut < sealed))


def _runs(*runs: tuple[int, int]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(*run) for run in runs])


def _aligned(rows: Iterable[NDArray[np.int64]]) -> Index:
    """Put rows of different lengths one below the other, -1 behind the shorter ones."""
    found = list(rows)
    index = np.full((len(found), max(map(len, found))), -1)
    for own, row in zip(index, found, strict=True):
        own[: len(row)] = row
    return index

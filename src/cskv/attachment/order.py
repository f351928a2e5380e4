"""From the model's order of tokens, its columns, to that of a view, sealed tokens first and then exact ones, and back.

Without padding the orders differ by where the sinks are. With padding each row has an order of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cskv.cache.ragged import sent
from cskv.latents.layout import Layout
from cskv.latents.view import View
from cskv.models.masks import MaskKind, of_pairs
from cskv.models.packing import is_packed
from cskv.models.padding import leading_padding

Made = TypeVar("Made")


class Orders:
    """What the layers of a forward have in common, made once: padding, columns of tokens, and masks in their order."""

    def __init__(self) -> None:
        self._padding, self._masks, self._pairs, self._packed = (_PerMask() for _ in range(4))
        self._columns: dict[tuple[str, torch.device], tuple[Layout, Tensor]] = {}

    def padding(self, mask: Any, seen: int, new: int, batch: int) -> tuple[int, ...]:
        """Count the leading columns of a forward that are no tokens of each row (see `leading_padding`)."""
        counts = self._padding.get(mask, (seen, new), lambda: leading_padding(mask, seen, new))
        return counts * batch if len(counts) == 1 else counts

    def is_packed(self, positions: Tensor) -> bool:
        """Return whether the positions of a row are those of several texts (see `cskv.models.packing`)."""
        return self._packed.get(positions, None, lambda: is_packed(positions))

    def of_pairs(self, mask: Any, kind: MaskKind, new: int, total: int, window: int | None) -> Tensor | None:
        """Write a mask out, as one of queries and tokens (see `cskv.models.masks`)."""
        if mask is None:
            return of_pairs(mask, kind, new, total, window)
        return self._pairs.get(mask, (new, total, window), lambda: of_pairs(mask, kind, new, total, window))

    def mask(self, mask: Tensor | None, view: View, new: int) -> Tensor | None:
        """Return the model's mask in the order of a view.

        Args:
            mask: (batch or 1, heads or 1, new, columns), or None for a causal one.
            view: what the queries read.
            new: queries, the last columns.
        """
        if mask is None:
            return None if view.layout is None else self._causal(view, view.layout, new)
        if view.layout is None and not (view.sinks and view.sealed):
            return mask[..., : view.length]
        key = (view.layout, view.sealed, view.length)
        return self._masks.get(mask, key, lambda: self._ordered(mask, view))

    def made(self, mask: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what is made of a mask, once for all layers that ask with this key."""
        return self._masks.get(mask, key, make)  # type: ignore[no-any-return]

    def columns(self, layout: Layout, device: torch.device) -> Tensor:
        """Return the columns of the tokens of both branches, (batch, tokens), -1 where a row has none."""
        known = self._columns.get(("both", device))
        if known is None or known[0] != layout:
            exact = sent(layout.exact_columns(), device)
            known = layout, torch.cat([self.sealed_columns(layout, device), exact], dim=1)
            self._columns["both", device] = known
        return known[1]

    def sealed_columns(self, layout: Layout, device: torch.device) -> Tensor:
        """Return the columns of the tokens of the compressed branch, (batch, tokens), -1 where a row has none."""
        known = self._columns.get(("sealed", device))
        if known is None or replace(known[0], length=layout.length) != layout:
            known = self._columns["sealed", device] = layout, sent(layout.sealed_columns(), device)
        return known[1]

    def in_columns(self, keys: Tensor, values: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Put keys and values, (batch, kv_heads, tokens of the view, head_dim), into the model's order."""
        sinks, sealed = view.sinks, view.sealed
        if view.layout is None:
            return _sinks_first(keys, sinks, sealed), _sinks_first(values, sinks, sealed)
        columns, length = self.columns(view.layout, keys.device), view.layout.length
        return _scattered(keys, columns, length), _scattered(values, columns, length)

    def nbytes(self) -> int:
        """Count the bytes allocated."""
        columns = (columns for _, columns in self._columns.values())
        return self._masks.nbytes() + self._pairs.nbytes() + sum(part.untyped_storage().nbytes() for part in columns)

    def clear(self) -> None:
        """Forget everything."""
        self._padding, self._masks, self._pairs, self._packed = (_PerMask() for _ in range(4))
        self._columns.clear()

    def _causal(self, view: View, layout: Layout, new: int) -> Tensor:
        columns = self.columns(layout, view.keys.device)[:, None, None]
        query = torch.arange(layout.length - new, layout.length, device=columns.device)[:, None]
        return (columns >= 0) & (columns <= query)

    def _ordered(self, mask: Tensor, view: View) -> Tensor:
        if view.layout is None:
            start, stop = view.sinks, view.sinks + view.sealed
            return torch.cat([mask[..., start:stop], mask[..., :start], mask[..., stop : view.length]], dim=-1)
        columns = self.columns(view.layout, mask.device)[:, None, None]
        shape = (columns.shape[0], *mask.shape[1:-1], columns.shape[-1])
        ordered = mask.expand(shape[0], -1, -1, -1).gather(-1, columns.clamp(min=0).expand(shape))
        return ordered.masked_fill(columns < 0, False if mask.dtype == torch.bool else -torch.inf)


class _PerMask:
    """Remembers what was made of masks, for as long as these live: every layer of a forward gets the same one."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Any], Hashable, Any]] = {}

    def get(self, mask: Any, key: Hashable, make: Callable[[], Made]) -> Made:
        if torch.compiler.is_compiling():  # it cannot trace what is kept between forwards
            return make()
        known = self._made.get(id(mask))
        if known is None or known[0]() is not mask or known[1] != key:
            known = weakref.ref(mask), key, make()
            alive = {name: made for name, made in self._made.items() if made[0]() is not None}
            self._made = alive | {id(mask): known}
        return known[2]

    def nbytes(self) -> int:
        made = (result for _, _, result in self._made.values())
        return sum(result.untyped_storage().nbytes() for result in made if isinstance(result, Tensor))


def _sinks_first(tokens: Tensor, sinks: int, sealed: int) -> Tensor:
    if not sinks or not sealed:
        return tokens
    stop = sealed + sinks
    return torch.cat([tokens[:, :, sealed:stop], tokens[:, :, :sealed], tokens[:, :, stop:]], dim=2)


def _scattered(tokens: Tensor, columns: Tensor, length: int) -> Tensor:
    """Put tokens into their columns, and zeros into those of no token."""
    index = columns.where(columns >= 0, length)[:, None, :, None].expand(tokens.shape)
    empty = tokens.new_zeros(*tokens.shape[:2], length + 1, tokens.shape[3])
    return empty.scatter(2, index, tokens)[:, :, :length]

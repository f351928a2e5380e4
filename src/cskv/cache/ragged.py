"""The bi-branch store of a batch that is padded on the left: every row is kept as it would be alone.

Sinks, groups and window of a row are counted from its first real token, and padding is no token of any of them. Rows
are aligned at their start in both branches (`cskv.latents.layout`), and rows seal when each of them is due. Padding
later on, between two turns of a conversation, is no padding here: those are tokens, which the model's mask hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.cache.bibranch import BiBranchStore, Exact, guessed_tokens, sealed_tokens
from cskv.latents.layout import Index, Layout, Row
from cskv.latents.view import View
from cskv.quantization.grid import Grid

Indices = tuple[Layout, Tensor, Tensor]


class RaggedStore(BiBranchStore):
    """Latents of sealed tokens, and the exact sinks and window of the newest, of rows of different lengths.

    Args:
        window, group, k_grid, v_grid, capacity, sinks: as for `BiBranchStore`.

    Attributes:
        length: columns of the model, padding included.
        sealed: places of the compressed branch: tokens of its longest row.
    """

    def __init__(
        self,
        window: int,
        group: int,
        k_grid: Grid | None = None,
        v_grid: Grid | None = None,
        capacity: int = 0,
        *,
        sinks: int = 0,
    ) -> None:
        super().__init__(window, group, k_grid, v_grid, capacity, sinks=sinks)
        self._align = math.lcm(*(grid.block_tokens for grid in self.grids if grid is not None))
        self._layout = Layout((), 0, sinks, self._align)
        self._padding: tuple[int, ...] = ()

    @property
    def awaits_tokens(self) -> bool:
        return not self.length or any(row.padding == self.length for row in self._layout.rows)

    def expect(self, padding: tuple[int, ...]) -> None:
        """Say how many of the next columns, the first ones, are padding of each row; of a row with tokens none are."""
        self._padding = padding

    @torch.compiler.disable
    def append(
        self,
        k_latents: Float[Tensor, "batch new k_rank"],
        v_latents: Float[Tensor, "batch new v_rank"],
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
        guessed: int = 0,
    ) -> View:
        """Append columns as `BiBranchStore.append` does. The first ones are returned as they came."""
        before, (batch, _, appended, _) = self.length, keys.shape
        if not before:
            self._layout = Layout((Row(0),) * batch, 0, self.sinks, self._align)
        self._seal_rows(0)
        held, new = self._exact, Exact(keys, values, k_latents, v_latents)
        padding, self._padding = self._padding or (0,) * batch, ()
        widths = (0, 0) if held is None else (held.keys.shape[2], held.k_latents.shape[1])
        self._layout, *indices = _appended(self._layout, widths, appended, padding, keys.device)
        self._exact = exact = _gathered(new if held is None else held.followed_by(new), *indices)
        self.length = before + appended
        view = View(keys, values)
        if before:
            latents = self._sealed_latents()
            view = View(exact.keys, exact.values, *latents, sinks=self.sinks, layout=self._layout)
        self._seal_rows(guessed_tokens(guessed, before, appended))
        return view

    def crop(self, length: int) -> None:
        if length >= self.length:
            return
        self._layout = layout = self._layout.cropped(length)
        if self._exact is not None:
            self._exact = self._exact.first(max(map(layout.exact, layout.rows)), max(map(layout.waiting, layout.rows)))
        self._crop_latents(layout.places)
        self.length = length

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(change)
        rows = self._layout.rows
        if not rows:
            return
        order = change(torch.arange(len(rows))).tolist()
        self._layout = Layout(tuple(rows[row] for row in order), self.length, self.sinks, self._align)
        self._crop_latents(self._layout.places)  # the longest row may be gone

    def clear(self) -> None:
        super().clear()
        self._layout = Layout((), 0, self.sinks, self._align)

    def _seal_rows(self, guessed: int) -> None:
        """Seal what is due of each row, but for guessed tokens."""
        layout, exact = self._layout, self._exact
        if exact is None:
            return
        due = (sealed_tokens(layout.real(row) - guessed - self.sinks, self.window, self.group) for row in layout.rows)
        counts = tuple(max(0, until - row.sealed) for until, row in zip(due, layout.rows, strict=True))
        if not any(counts):
            return
        self.cuts_gradients = self.cuts_gradients or exact.keys.requires_grad or exact.values.requires_grad
        self._layout, *indices = _sealing(layout, counts, exact.keys.device)
        self._exact = _gathered(exact, *indices)
        for index, (row, count) in enumerate(zip(self._layout.rows, counts, strict=True)):
            if count:
                place = self._layout.first_place(row, count)
                self._k.put(index, place, exact.k_latents[index, :count], len(counts))
                self._v.put(index, place, exact.v_latents[index, :count], len(counts))
        self._hold(self._layout.places)


# The layers of a model ask for the same indices one after the other.
@lru_cache(maxsize=2)
def _appended(
    layout: Layout, widths: tuple[int, int], new: int, padding: tuple[int, ...], device: torch.device
) -> Indices:
    after, exact, latents = layout.appended(widths, new, padding)
    return after, sent(exact, device), sent(latents, device)


@lru_cache(maxsize=2)
def _sealing(layout: Layout, counts: tuple[int, ...], device: torch.device) -> Indices:
    after, exact, latents = layout.sealing(counts)
    return after, sent(exact, device), sent(latents, device)


def sent(index: Index, device: torch.device) -> Tensor:
    """Copy an index to a device, without waiting for it."""
    with torch.inference_mode(False):
        host = torch.from_numpy(index)
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _gathered(parts: Exact, exact: Tensor, waiting: Tensor) -> Exact:
    return Exact(
        _taken(parts.keys, exact[:, None, :, None]),
        _taken(parts.values, exact[:, None, :, None]),
        _taken(parts.k_latents, waiting[:, :, None]),
        _taken(parts.v_latents, waiting[:, :, None]),
    )


def _taken(part: Tensor, index: Tensor) -> Tensor:
    """Take tokens, the last dimension but one, by an index that broadcasts to the others; -1 gives zeros."""
    shape = (*part.shape[:-2], index.shape[-2], part.shape[-1])
    taken = part.gather(-2, index.clamp(min=0).expand(shape))
    return taken.masked_fill(index < 0, 0)

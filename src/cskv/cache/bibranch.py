"""The bi-branch store of one layer: old tokens as latents, the newest exactly (paper, section 3.2).

Tokens are counted from 0. Sealed tokens are held as latents only, packed where there is a grid; the newest ones
exactly, with the latents that they will be sealed as:

    0 ............... sealed ............... length
    read from latents | read from the window

Before a forward that appends to `s` cached tokens, the first `((s - window) // group) * group` are sealed, as in the
authors' implementation (there `window` is 0). So a prefill attends exactly, and reads nothing from latents.

After a forward the exact part is trimmed to what the next forward can still read. A forward of a few tokens (a guess
to be verified) can be cropped back, so it keeps what would be read after that; a longer one (a prefill) keeps no more
than the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.cache.latents import LatentBytes, latent_store
from cskv.config import sealed_tokens
from cskv.latents.view import View
from cskv.quantization.grid import Grid


class _Recent(NamedTuple):
    """Of the tokens that are not sealed yet: exact keys and values, and the latents to come."""

    keys: Float[Tensor, "batch kv_heads recent head_dim"]
    values: Float[Tensor, "batch kv_heads recent head_dim"]
    k_latents: Float[Tensor, "batch recent k_rank"]
    v_latents: Float[Tensor, "batch recent v_rank"]

    def followed_by(self, new: _Recent) -> _Recent:
        return _Recent(*(torch.cat(pair, dim=dim) for pair, dim in zip(zip(self, new, strict=True), DIMS, strict=True)))

    def tokens(self, start: int, stop: int) -> _Recent:
        """Views of a range of tokens."""
        return _Recent(*(part.narrow(dim, start, stop - start) for part, dim in zip(self, DIMS, strict=True)))

    def owned(self) -> _Recent:
        """The same in storage of its own: a view keeps all the others alive."""
        return _Recent(*(part.clone() for part in self))


DIMS = (2, 2, 1, 1)  # where the tokens are in keys, values and latents


class BiBranchStore:
    """Latents of sealed tokens and the exact window of the newest.

    Args:
        window: the newest tokens that are always read exactly.
        group: tokens are sealed in groups of this many.
        k_grid, v_grid: on which latents are packed when they are sealed; None keeps them as they come. The tokens of a
            block divide `group`.
        room: tokens that there is room for from the first sealing on; more make it grow as usual.
    """

    def __init__(
        self, window: int, group: int, k_grid: Grid | None = None, v_grid: Grid | None = None, room: int = 0
    ) -> None:
        self.window = window
        self.group = group
        self.grids = (k_grid, v_grid)
        self.ranks: tuple[int, int] | None = None
        self._k, self._v = latent_store(k_grid, room), latent_store(v_grid, room)
        self._recent: _Recent | None = None

    @property
    def sealed(self) -> int:
        """Tokens of the compressed branch."""
        return self._k.length

    @property
    def length(self) -> int:
        """Tokens held, compressed or not."""
        return self.sealed + (0 if self._recent is None else self._recent.keys.shape[2])

    @property
    def batch(self) -> int:
        """Sequences held; 0 when empty."""
        return self._recent.keys.shape[0] if self._recent is not None else self._k.batch

    def append(
        self,
        k_latents: Float[Tensor, "batch new k_rank"],
        v_latents: Float[Tensor, "batch new v_rank"],
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
    ) -> View:
        """Seal what is due, append new tokens, and return what their queries read."""
        before = self.length
        self.ranks = k_latents.shape[2], v_latents.shape[2]
        self._seal(sealed_tokens(before, self.window, self.group))
        new, held = _Recent(keys, values, k_latents, v_latents), self._recent
        self._recent = new if held is None else held.followed_by(new)
        view = self._view(self._recent)
        if not self._seal(self._rollback_point(before)) and held is None:
            self._recent = self._recent.owned()  # the caller's tensors may be views of larger ones
        return view

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. What was sealed stays sealed: its exact keys and values are gone."""
        if length >= self.length:
            return
        if self._recent is not None:
            self._recent = self._recent.tokens(0, max(0, length - self.sealed)).owned()
        self._k.crop(length)
        self._v.crop(length)

    def clear(self) -> None:
        """Forget everything."""
        self._k.clear()
        self._v.clear()
        self._recent = self.ranks = None

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (reorder, repeat, select along dimension 0, or move) to every tensor held."""
        self._k.map_batch(change)
        self._v.map_batch(change)
        if self._recent is not None:
            self._recent = _Recent(*map(change, self._recent))

    def latent_nbytes(self) -> LatentBytes:
        """Bytes of sealed latents: payload, scales, minima and slack."""
        return self._k.nbytes() + self._v.nbytes()

    def window_nbytes(self) -> int:
        """Bytes of exact keys and values, and of the latents that they will be sealed as."""
        return 0 if self._recent is None else sum(part.untyped_storage().nbytes() for part in self._recent)

    def nbytes(self) -> int:
        """Bytes really allocated."""
        return self.latent_nbytes().total + self.window_nbytes()

    def _view(self, recent: _Recent) -> View:
        if not self.sealed:
            return View(recent.keys, recent.values)
        return View(recent.keys, recent.values, self._k.view(self.sealed), self._v.view(self.sealed))

    def _rollback_point(self, before: int) -> int:
        """The tokens that may be sealed now: no crop to more than `before` tokens can ask for them exactly."""
        appended = self.length - before
        undoable = before > 0 and appended <= self.group
        return sealed_tokens(before + 1 if undoable else self.length, self.window, self.group)

    def _seal(self, until: int) -> bool:
        """Seal the tokens before `until`; whether there were any."""
        count, recent = until - self.sealed, self._recent
        if count <= 0 or recent is None:
            return False
        self._recent = recent.tokens(count, recent.keys.shape[2]).owned()
        self._k.append(recent.k_latents[:, :count])
        self._v.append(recent.v_latents[:, :count])
        return True

"""The bi-branch store of one layer: old tokens as latents, the newest exactly (paper, section 3.2).

Tokens are counted from 0. Sealed tokens are held as latents only, packed where there is a grid; the newest ones
exactly, with the latents that they will be sealed as:

    0 ............... sealed ............... length
    read from latents | read from the window

Before a forward that appends to `s` cached tokens, the first `((s - window) // group) * group` are sealed, as in the
authors' implementation (there `window` is 0). So a prefill attends exactly, and reads nothing from latents.

After a forward the exact part is trimmed to what the next forward can still read. A guess that is to be verified can be
cropped back, so what would be read after that is kept: of a forward that appends a few tokens to a cache, and of one
that says how many of its tokens are a guess. The window is whole after such a crop. A crop that goes further back finds
latents in place of the exact tokens that were sealed: they are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.cache.latents import LatentBytes, latent_store
from cskv.latents.view import Latents, View
from cskv.quantization.grid import Grid

Tokens = TypeVar("Tokens")
MOST_GUESSED = 64  # tokens: a longer piece after a cache is one of a prompt, which nobody crops


class _Recent(NamedTuple):
    """Of the tokens that are not sealed yet: exact keys and values, and the latents to come."""

    keys: Float[Tensor, "batch kv_heads recent head_dim"]
    values: Float[Tensor, "batch kv_heads recent head_dim"]
    k_latents: Float[Tensor, "batch recent k_rank"]
    v_latents: Float[Tensor, "batch recent v_rank"]

    def followed_by(self, new: _Recent) -> _Recent:
        return _Recent(
            torch.cat([self.keys, new.keys], dim=2),
            torch.cat([self.values, new.values], dim=2),
            torch.cat([self.k_latents, new.k_latents], dim=1),
            torch.cat([self.v_latents, new.v_latents], dim=1),
        )

    def tokens(self, start: int, count: int) -> _Recent:
        """Copy a range of tokens into storage of its own: a view would keep all the others alive."""
        parts = zip(self, DIMS, strict=True)
        return _Recent(
            *(part.narrow(dim, start, count).clone(memory_format=torch.contiguous_format) for part, dim in parts)
        )


DIMS = (2, 2, 1, 1)  # where the tokens are in keys, values and latents


class BiBranchStore:
    """Latents of sealed tokens and the exact window of the newest.

    Args:
        window: the newest tokens that are always read exactly.
        group: tokens are sealed in groups of this many.
        k_grid, v_grid: on which latents are packed when they are sealed; None keeps them as they come. The tokens of a
            block divide `group`.
        capacity: tokens to preallocate at the first sealing; more make it grow as usual.

    Attributes:
        length: tokens held, compressed or not.
        sealed: tokens of the compressed branch.
        cuts_gradients: whether any of these were appended with gradients to flow back through them.
    """

    def __init__(
        self, window: int, group: int, k_grid: Grid | None = None, v_grid: Grid | None = None, capacity: int = 0
    ) -> None:
        self.window = window
        self.group = group
        self.grids = (k_grid, v_grid)
        self.length = self.sealed = 0
        self.cuts_gradients = False
        self._k, self._v = latent_store(k_grid, capacity), latent_store(v_grid, capacity)
        self._recent: _Recent | None = None
        self._latents: tuple[Latents, Latents] | None = None  # views of the sealed ones

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
        guessed: int = 0,
    ) -> View:
        """Seal what is due, append new tokens, and return what their queries read.

        Args:
            k_latents, v_latents: the latents that the tokens will be sealed as.
            keys, values: exact ones, after norm and RoPE.
            guessed: how many of the new tokens, the last ones, may be cropped again before the next append.
        """
        before, appended = self.length, keys.shape[2]
        self._seal(sealed_tokens(before, self.window, self.group))
        new, held = _Recent(keys, values, k_latents, v_latents), self._recent
        self._recent = recent = new if held is None else held.followed_by(new)
        self.length = before + appended
        view = View(recent.keys, recent.values, *self._sealed_latents())
        if before and appended <= MOST_GUESSED:
            guessed = max(guessed, appended - 1)
        if not self._seal(sealed_tokens(self.length - guessed, self.window, self.group)) and held is None:
            self._recent = recent.tokens(0, appended)  # the caller's tensors may be views of larger ones
        return view

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. What was sealed stays sealed: its exact keys and values are gone."""
        if length >= self.length:
            return
        if self._recent is not None:
            self._recent = self._recent.tokens(0, max(0, length - self.sealed))
        if length < self.sealed:
            self._k.crop(length)
            self._v.crop(length)
            self.sealed, self._latents = length, None
        self.length = length

    def clear(self) -> None:
        """Forget everything."""
        self._k.clear()
        self._v.clear()
        self._recent = self._latents = None
        self.length = self.sealed = 0
        self.cuts_gradients = False

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (reorder, repeat, select along dimension 0, or move) to every tensor held."""
        self._k.map_batch(change)
        self._v.map_batch(change)
        self._latents = None
        if self._recent is not None:
            self._recent = _Recent(*map(change, self._recent))

    def latent_nbytes(self) -> LatentBytes:
        """Count the bytes of sealed latents: payload, scales, minima and slack."""
        return self._k.nbytes() + self._v.nbytes()

    def window_nbytes(self) -> int:
        """Count the bytes of exact keys and values, and of the latents that they will be sealed as."""
        return 0 if self._recent is None else sum(part.untyped_storage().nbytes() for part in self._recent)

    def nbytes(self) -> int:
        """Count the bytes really allocated."""
        return self.latent_nbytes().total + self.window_nbytes()

    def _sealed_latents(self) -> tuple[Latents | None, Latents | None]:
        """View the sealed latents. The views are kept until some are sealed, cropped or moved."""
        if not self.sealed:
            return None, None
        if torch.compiler.is_compiling():  # it would take the sizes of kept views for constants
            return self._k.view(self.sealed), self._v.view(self.sealed)
        if self._latents is None:
            self._latents = self._k.view(self.sealed), self._v.view(self.sealed)
        return self._latents

    def _seal(self, until: int) -> bool:
        """Seal the tokens before `until`; return whether there were any."""
        count, recent = until - self.sealed, self._recent
        if count <= 0 or recent is None:
            return False
        self.cuts_gradients = self.cuts_gradients or recent.keys.requires_grad or recent.values.requires_grad
        self._recent = recent.tokens(count, recent.keys.shape[2] - count)
        self._k.append(recent.k_latents[:, :count])
        self._v.append(recent.v_latents[:, :count])
        self.sealed, self._latents = until, None
        return True


def sealed_tokens(length: Tokens, window: int, group: int) -> Tokens:
    """Count the tokens, of `length` cached ones, that are sealed before a forward: whole groups outside the window.

    Args:
        length: a number, or an array or tensor of them.
        window, group: see `CSKVConfig`.
    """
    return (length - window) * (length > window) // group * group  # type: ignore[operator, return-value]

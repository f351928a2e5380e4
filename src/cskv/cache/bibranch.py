"""The bi-branch store of one layer: old tokens as latents, the newest exactly (paper, section 3.2).

Tokens are counted from 0. Sealed tokens are held as latents only, packed where there is a grid; the first ones and the
newest ones exactly, the latter with the latents that they will be sealed as:

    0 ............ sinks .................... sinks + sealed ......... length
    read exactly   | read from latents        | read from the window

Before a forward that appends to `s` cached tokens, the first `((s - sinks - window) // group) * group` behind the sinks
are sealed, as in the authors' implementation (there `sinks` and `window` are 0). So a prefill attends exactly, and
reads nothing from latents.

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


class Exact(NamedTuple):
    """Keys and values of the tokens that are not sealed, sinks first, and the latents that the others will become."""

    keys: Float[Tensor, "batch kv_heads exact head_dim"]
    values: Float[Tensor, "batch kv_heads exact head_dim"]
    k_latents: Float[Tensor, "batch waiting k_rank"]
    v_latents: Float[Tensor, "batch waiting v_rank"]

    def followed_by(self, new: Exact) -> Exact:
        return Exact(
            torch.cat([self.keys, new.keys], dim=2),
            torch.cat([self.values, new.values], dim=2),
            torch.cat([self.k_latents, new.k_latents], dim=1),
            torch.cat([self.v_latents, new.v_latents], dim=1),
        )

    def first(self, exact: int, waiting: int) -> Exact:
        """Copy the first tokens and latents into storage of their own: a view would keep all the others alive."""
        return Exact(
            _copied(self.keys[:, :, :exact]),
            _copied(self.values[:, :, :exact]),
            _copied(self.k_latents[:, :waiting]),
            _copied(self.v_latents[:, :waiting]),
        )

    def without(self, sinks: int, count: int) -> Exact:
        """Copy all but the `count` tokens behind the sinks."""
        return Exact(
            torch.cat([self.keys[:, :, :sinks], self.keys[:, :, sinks + count :]], dim=2),
            torch.cat([self.values[:, :, :sinks], self.values[:, :, sinks + count :]], dim=2),
            _copied(self.k_latents[:, count:]),
            _copied(self.v_latents[:, count:]),
        )

    def nbytes(self) -> int:
        """Count the bytes really allocated."""
        return sum(part.untyped_storage().nbytes() for part in self)


def _copied(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


class BiBranchStore:
    """Latents of sealed tokens, and the exact sinks and window of the newest. Every row has all tokens.

    Args:
        window: the newest tokens that are always read exactly.
        group: tokens are sealed in groups of this many.
        k_grid, v_grid: on which latents are packed when they are sealed; None keeps them as they come. The tokens of a
            block divide `group`.
        capacity: tokens to preallocate at the first sealing; more make it grow as usual.
        sinks: the first tokens, which are never sealed.

    Attributes:
        length: tokens held, compressed or not.
        sealed: tokens of the compressed branch.
        cuts_gradients: whether any of these were appended with gradients to flow back through them.
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
        self.window = window
        self.group = group
        self.sinks = sinks
        self.grids = (k_grid, v_grid)
        self.length = 0
        self.cuts_gradients = False
        self._k, self._v = latent_store(k_grid, capacity), latent_store(v_grid, capacity)
        self._exact: Exact | None = None
        self._latents: tuple[Latents, Latents] | None  # views of the sealed ones
        self._hold(0)

    @property
    def batch(self) -> int:
        """Sequences held; 0 when empty."""
        return self._exact.keys.shape[0] if self._exact is not None else self._k.batch

    @property
    def awaits_tokens(self) -> bool:
        """Whether any row has no token yet: whether the next columns of the model may be its padding."""
        return not self.length

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
        if before >= self._due_at:
            self._seal(before)
        if before < self.sinks:  # what never becomes latents
            k_latents, v_latents = k_latents[:, self.sinks - before :], v_latents[:, self.sinks - before :]
        new, held = Exact(keys, values, k_latents, v_latents), self._exact
        self._exact = exact = new if held is None else held.followed_by(new)
        self.length = before + appended
        view = View(exact.keys, exact.values, *self._sealed_latents(), sinks=self.sinks)
        behind = self.length - guessed_tokens(guessed, before, appended)
        if behind >= self._due_at:
            self._seal(behind)
        elif held is None:
            self._exact = exact.first(appended, k_latents.shape[1])  # the caller's tensors may be views of larger ones
        return view

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. What was sealed stays sealed: its exact keys and values are gone."""
        if length >= self.length:
            return
        behind_sinks = max(0, length - self.sinks)
        if self._exact is not None:
            exact = max(min(length, self.sinks), length - self.sealed)
            self._exact = self._exact.first(exact, max(0, behind_sinks - self.sealed))
        if behind_sinks < self.sealed:
            self._crop_latents(behind_sinks)
        self.length = length

    def clear(self) -> None:
        """Forget everything."""
        self._k.clear()
        self._v.clear()
        self._exact = None
        self.length = 0
        self.cuts_gradients = False
        self._hold(0)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (reorder, repeat, select along dimension 0, or move) to every tensor held."""
        self._k.map_batch(change)
        self._v.map_batch(change)
        self._latents = None
        if self._exact is not None:
            self._exact = Exact(*map(change, self._exact))

    def latent_nbytes(self) -> LatentBytes:
        """Count the bytes of sealed latents: payload, scales, minima and slack."""
        return self._k.nbytes() + self._v.nbytes()

    def window_nbytes(self) -> int:
        """Count the bytes of exact keys and values, and of the latents that they will be sealed as."""
        return 0 if self._exact is None else self._exact.nbytes()

    def nbytes(self) -> int:
        """Count the bytes really allocated."""
        return self.latent_nbytes().total + self.window_nbytes()

    def _sealed_latents(self) -> tuple[Latents | None, Latents | None]:
        """View the sealed latents. The views are kept until some are sealed, cropped or moved."""
        sealed = self.sealed
        if not sealed:
            return None, None
        if torch.compiler.is_compiling():  # it would take the sizes of kept views for constants
            return self._k.view(sealed), self._v.view(sealed)
        if self._latents is None:
            self._latents = self._k.view(sealed), self._v.view(sealed)
        return self._latents

    def _crop_latents(self, sealed: int) -> None:
        self._k.crop(sealed)
        self._v.crop(sealed)
        self._hold(sealed)

    def _seal(self, length: int) -> None:
        """Seal all but what a forward that appends to `length` tokens reads exactly."""
        until, exact = sealed_tokens(length - self.sinks, self.window, self.group), self._exact
        assert exact is not None, "some tokens are due"
        count = until - self.sealed
        self.cuts_gradients = self.cuts_gradients or exact.keys.requires_grad or exact.values.requires_grad
        self._exact = exact.without(self.sinks, count)
        self._k.append(exact.k_latents[:, :count])
        self._v.append(exact.v_latents[:, :count])
        self._hold(until)

    def _hold(self, sealed: int) -> None:
        """Note how many tokens are sealed, and the length at which others are due: no step computes it."""
        self.sealed, self._latents = sealed, None
        self._due_at = self.sinks + self.window + (sealed // self.group + 1) * self.group


def guessed_tokens(told: int, before: int, appended: int) -> int:
    """Count the newest tokens that may be cropped again: those that are told, or all but the first of a short piece."""
    return max(told, appended - 1) if before and appended <= MOST_GUESSED else told


def sealed_tokens(length: Tokens, window: int, group: int) -> Tokens:
    """Count the tokens, of `length` cached ones, that are sealed before a forward: whole groups outside the window.

    Args:
        length: a number, or an array or tensor of them; sinks do not count.
        window, group: see `CSKVConfig`.
    """
    return (length - window) * (length > window) // group * group  # type: ignore[operator, return-value]

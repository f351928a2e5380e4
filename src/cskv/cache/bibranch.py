"""The bi-branch store of one layer: old tokens as latents, the newest exactly (paper, section 3.2).

Tokens are counted from 0. The store holds latents of every token, and exact keys and values of the newest ones:

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
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.cache.buffer import TokenBuffer


@dataclass(frozen=True)
class View:
    """What a forward reads, the tokens that it appends included. It is valid until the next append or crop.

    Attributes:
        k_latents, v_latents: (batch, sealed, rank): the compressed branch, before norm and RoPE.
        keys, values: (batch, kv_heads, length - sealed, head_dim): the exact branch, after norm and RoPE.
    """

    k_latents: Float[Tensor, "batch sealed k_rank"]
    v_latents: Float[Tensor, "batch sealed v_rank"]
    keys: Float[Tensor, "batch kv_heads recent head_dim"]
    values: Float[Tensor, "batch kv_heads recent head_dim"]


class BiBranchStore:
    """Latents of all tokens and the exact window of the newest.

    Args:
        window: the newest tokens that are always read exactly.
        group: tokens are sealed in groups of this many.
    """

    def __init__(self, window: int, group: int) -> None:
        self.window = window
        self.group = group
        self.sealed = 0
        self._k_latents = TokenBuffer()
        self._v_latents = TokenBuffer()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens held, compressed or not."""
        return self._k_latents.length

    @property
    def batch(self) -> int:
        """Sequences held; 0 when empty."""
        return self._k_latents.tokens.shape[0] if self.length else 0

    @property
    def ranks(self) -> tuple[int, int] | None:
        """The ranks of the key and value latents held, or None when empty."""
        if not self.length:
            return None
        return self._k_latents.tokens.shape[2], self._v_latents.tokens.shape[2]

    def append(
        self,
        k_latents: Float[Tensor, "batch new k_rank"],
        v_latents: Float[Tensor, "batch new v_rank"],
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
    ) -> View:
        """Seal what is due, append new tokens, and return what their queries read."""
        before = self.length
        self._seal(self._due(before))
        self._k_latents.append(k_latents)
        self._v_latents.append(v_latents)
        if self._keys is not None and self._values is not None:
            keys = torch.cat([self._keys, keys], dim=2)
            values = torch.cat([self._values, values], dim=2)
        view = View(self._k_latents.tokens[:, : self.sealed], self._v_latents.tokens[:, : self.sealed], keys, values)
        self._keep_recent(keys, values, self._rollback_point(before))
        return view

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. What was sealed stays sealed: its exact keys and values are gone."""
        if length >= self.length:
            return
        self._k_latents.crop(length)
        self._v_latents.crop(length)
        if self._keys is not None and self._values is not None:
            recent = max(0, length - self.sealed)
            self._keys, self._values = self._keys[:, :, :recent].clone(), self._values[:, :, :recent].clone()
        self.sealed = min(self.sealed, length)

    def clear(self) -> None:
        """Forget everything."""
        self._k_latents.clear()
        self._v_latents.clear()
        self._keys = self._values = None
        self.sealed = 0

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (reorder, repeat, select along dimension 0, or move) to every tensor held."""
        self._k_latents.map_batch(change)
        self._v_latents.map_batch(change)
        if self._keys is not None and self._values is not None:
            self._keys, self._values = change(self._keys), change(self._values)

    def latent_nbytes(self) -> int:
        """Bytes of latents, slack not included."""
        return self._k_latents.nbytes() + self._v_latents.nbytes() - self.slack_nbytes()

    def slack_nbytes(self) -> int:
        """Bytes allocated for latents of tokens yet to come."""
        return self._k_latents.slack_nbytes() + self._v_latents.slack_nbytes()

    def window_nbytes(self) -> int:
        """Bytes of exact keys and values."""
        if self._keys is None or self._values is None:
            return 0
        return self._keys.untyped_storage().nbytes() + self._values.untyped_storage().nbytes()

    def nbytes(self) -> int:
        """Bytes really allocated."""
        return self.latent_nbytes() + self.slack_nbytes() + self.window_nbytes()

    def _due(self, length: int) -> int:
        """The tokens that are sealed when `length` are held."""
        return max(0, length - self.window) // self.group * self.group

    def _rollback_point(self, before: int) -> int:
        """The tokens that may be sealed now: no crop to more than `before` tokens can ask for them exactly."""
        appended = self.length - before
        undoable = before > 0 and appended <= self.group
        return self._due(before + 1 if undoable else self.length)

    def _seal(self, count: int) -> None:
        if count > self.sealed and self._keys is not None and self._values is not None:
            self._keep_recent(self._keys, self._values, count)

    def _keep_recent(self, keys: Tensor, values: Tensor, sealed: int) -> None:
        """Keep the exact tokens from `sealed` on, in storage of their own: a view would keep all the others alive."""
        drop = max(0, sealed - self.sealed)
        self.sealed = max(self.sealed, sealed)
        self._keys, self._values = keys[:, :, drop:].clone(), values[:, :, drop:].clone()

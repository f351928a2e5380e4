"""The compressed layer of a transformers cache: a `DynamicLayer` whose old tokens exist only as latents.

The attention module's pre-hook stages the latents of the new tokens (`stage`); the model then calls `update` with their
true keys and values, and gets back what its queries attend to: the exact window, and old tokens rebuilt for this call
where the attention function cannot read their latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from cskv.attachment.attending import MOST_NEW, Call
from cskv.cache.bibranch import BiBranchStore
from cskv.cache.positions import PositionTable
from cskv.errors import CacheError
from cskv.quantization.grid import Grid

Grids = tuple[Grid | None, Grid | None]


@dataclass(frozen=True)
class Staged:
    """What the pre-hook hands over for one forward.

    Attributes:
        latents: from the new tokens' keys, (batch, kv_heads, new, head_dim), to their latents, (batch, new, rank) each.
            Latents of values, and mostly those of keys, come from the layer input, which is known already.
        positions: what the shared table stores of them, or None if another layer has stored it or keys are not rotated.
        rebuild: from latents of sealed tokens, (batch, sealed, rank) each, to their keys and values,
            (batch, kv_heads, sealed, head_dim).
        call: where the attention function will look for what to attend to; None where that is the model's own.
    """

    latents: Callable[[Tensor], tuple[Tensor, Tensor]]
    positions: tuple[Tensor, ...] | None
    rebuild: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    call: Call | None = None


class CSKVLayer(DynamicLayer):
    """Latents of sealed tokens, exact keys and values of the newest.

    Args:
        window, group: see `CSKVConfig`.
        grids: on which key and value latents are packed, or None each.
        table: the positions shared by the layers of one cache, or None where keys are not rotated.
        owns_table: whether this layer is the one that appends to the table and reorders or crops it.
        room: tokens that there is room for from the start.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # nothing can be allocated before the ranks are seen

    def __init__(
        self,
        window: int,
        group: int,
        grids: Grids,
        table: PositionTable | None,
        owns_table: bool,
        room: int = 0,
    ) -> None:
        super().__init__()
        self.store = BiBranchStore(window, group, *grids, room=room)
        self.table = table
        self.owns_table = owns_table
        self._staged: Staged | None = None

    def stage(self, staged: Staged) -> None:
        """Take the latents of the tokens that the next `update` brings."""
        self._staged = staged

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens and return the keys and values that their queries attend to.

        Those are all, or the exact ones alone where our attention function reads the latents itself.

        Args:
            key_states, value_states: (batch, kv_heads, new, head_dim), after norm and RoPE.

        Raises:
            CacheError: no latents were staged: the model that runs is not the one that the compressor is attached to.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            raise CacheError(
                "this cache holds compressed tokens, and a model without its compressor tried to append to it; "
                "attach the adapter again, or start a new cache"
            )
        self.is_initialized = True
        self.device, self.dtype = key_states.device, key_states.dtype
        if staged.positions is not None and self.table is not None:
            self.table.append(staged.positions)
        k_latents, v_latents = staged.latents(key_states)
        if v_latents.shape[1] != key_states.shape[2]:
            raise CacheError(f"{v_latents.shape[1]} tokens were staged, {key_states.shape[2]} came; start a new cache")
        view = self.store.append(k_latents, v_latents, key_states, value_states)
        if view.k is None or view.v is None:
            return view.keys, view.values
        if staged.call is not None and key_states.shape[2] <= MOST_NEW:
            staged.call.view = view
            return view.keys, view.values
        keys, values = staged.rebuild(view.k.read(), view.v.read())
        return torch.cat([keys, view.keys], dim=2), torch.cat([values, view.values], dim=2)

    def get_seq_length(self, *_args: Any) -> int:
        """Tokens cached, compressed or not."""
        return self.store.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(keys that the next forward attends to, offset of the first): old tokens are rebuilt, so all of them."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length  # a tensor before 5.4
        return self.store.length + new, 0

    def get_max_length(self) -> int:
        """-1: the layer grows without bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: the same under its name in older releases."""
        return -1

    def crop(self, tokens: int | Tensor) -> None:
        """Forget the last `-tokens` tokens, or, for a positive number, all but the first `tokens` (older releases)."""
        tokens = int(tokens)  # some releases pass a tensor
        length = self.store.length + tokens if tokens < 0 else tokens
        if tokens == 0 or length >= self.store.length:
            return
        self.store.crop(max(0, length))
        if self.owns_table and self.table is not None:
            self.table.crop(max(0, length))

    def reset(self) -> None:
        """Forget everything."""
        self.store.clear()
        if self.owns_table and self.table is not None:
            self.table.clear()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the surviving beams."""
        self._map_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map_batch(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._map_batch(lambda rows: rows[indices.to(rows.device), ...])

    def offload(self) -> None:
        """Refused: the compressed layer is small, and moving it is not implemented.

        Raises:
            CacheError: always.
        """
        raise CacheError("a compressed cache cannot be offloaded; use cache_implementation='dynamic'")

    def prefetch(self) -> None:
        """Nothing is ever offloaded."""

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.store.map_batch(change)
        if self.owns_table and self.table is not None:
            self.table.map_batch(change)

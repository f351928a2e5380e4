"""The compressed layer of a transformers cache: a `DynamicLayer` whose old tokens exist only as latents.

The attention module's pre-hook leaves the step under way here (`cskv.attachment.step`); the model then calls `update`
with the true keys and values of the new tokens, and gets back what its attention function is to have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from cskv.cache.bibranch import BiBranchStore
from cskv.cache.positions import PositionTable
from cskv.cache.ragged import RaggedStore
from cskv.errors import CacheError
from cskv.quantization.grid import Grid

if TYPE_CHECKING:
    from cskv.attachment.step import Step

Grids = tuple[Grid | None, Grid | None]
NO_COMPRESSOR = (
    "this cache holds compressed tokens, and a model without its compressor tried to append to it; attach the adapter "
    "again, or start a new cache"
)


class CSKVLayer(DynamicLayer):
    """Latents of sealed tokens, exact keys and values of the first and the newest.

    Args:
        window, group, sinks: see `CSKVConfig`.
        grids: on which key and value latents are packed, or None each.
        table: the positions shared by the layers of one cache, or None where keys are not rotated.
        owns_table: whether this layer is the one that appends to the table and reorders or crops it.
        fingerprint: of the factors that make the latents.
        capacity: tokens to preallocate.

    Attributes:
        step: the forward under way, from the module's pre-hook to `update`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # nothing can be allocated before the ranks are seen

    def __init__(
        self,
        window: int,
        group: int,
        sinks: int,
        grids: Grids,
        table: PositionTable | None,
        owns_table: bool,
        fingerprint: str,
        capacity: int = 0,
    ) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {"window": window, "group": group, "sinks": sinks, "capacity": capacity}
        self._settings |= {"k_grid": grids[0], "v_grid": grids[1]}
        self.store = BiBranchStore(**self._settings)
        self.table = table
        self.owns_table = owns_table
        self.fingerprint = fingerprint
        self.step: Step | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens and return the keys and values for the model's attention function (see `Step.append`).

        Args:
            key_states, value_states: (batch, kv_heads, new, head_dim), after norm and RoPE.

        Raises:
            CacheError: there is no step: the model that runs is not the one that the compressor is attached to.
        """
        step, self.step = self.step, None
        if step is None:
            raise CacheError(NO_COMPRESSOR)
        self.is_initialized = True
        self.device, self.dtype = key_states.device, key_states.dtype
        return step.append(key_states, value_states)

    def expect(self, padding: tuple[int, ...]) -> None:
        """Hear how many of the next columns, the first ones, are padding of each row; nothing for none of any row.

        An empty layer chooses by it how it keeps its tokens.
        """
        if not self.store.length:
            kind = RaggedStore if any(padding) else BiBranchStore
            if type(self.store) is not kind:
                self.store = kind(**self._settings)
        if isinstance(self.store, RaggedStore):
            self.store.expect(padding)

    def get_seq_length(self, *_args: Any) -> int:
        """Count the tokens cached, compressed or not."""
        return self.store.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return (keys that the next forward attends to, offset of the first): all of them, from 0 on."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length  # a tensor before 5.4
        return self.store.length + new, 0

    def position_nbytes(self) -> int:
        """Count the bytes of the positions that this layer keeps."""
        return self.table.nbytes() if self.owns_table and self.table is not None else 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows without bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, the same, under its name in older releases."""
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
        """Refuse: the compressed layer is small, and moving it is not implemented.

        Raises:
            CacheError: always.
        """
        raise CacheError("a compressed cache cannot be offloaded; use cache_implementation='dynamic'")

    def prefetch(self) -> None:
        """Do nothing: nothing is ever offloaded."""

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.store.map_batch(change)
        if self.owns_table and self.table is not None:
            self.table.map_batch(change)

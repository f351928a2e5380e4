"""The compressed layer of a transformers `StaticCache`: memory of fixed size, lengths on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import StaticLayer

from cskv.attachment.layer import NO_COMPRESSOR
from cskv.cache.angles import AngleTable
from cskv.cache.clock import Clock
from cskv.cache.static import Grids, StaticStore
from cskv.errors import CacheError

if TYPE_CHECKING:
    from cskv.attachment.static_step import StaticStep


class StaticCSKVLayer(StaticLayer):
    """Latents of all tokens behind the sinks, exact keys and values of the sinks and the newest, of fixed size.

    Args:
        clock: of the cache, and whether this layer is the one that sets it.
        owns_clock: see `clock`.
        grids: on which key and value latents are packed, or None each.
        table: the angles shared by layers of the cache, or None where keys are not rotated.
        owns_table: whether this layer is the one that writes them.
        fingerprint: of the factors that make the latents.

    Attributes:
        step: the forward under way, from the module's pre-hook to `update`.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = True
    supports_early_init = False  # nothing can be allocated before the ranks are seen

    def __init__(
        self, clock: Clock, owns_clock: bool, grids: Grids, table: AngleTable | None, owns_table: bool, fingerprint: str
    ) -> None:
        super().__init__(max_cache_len=clock.capacity)
        self.__dict__.pop("cumulative_length", None)  # the clock has one for all layers
        self.clock, self.owns_clock = clock, owns_clock
        self.store = StaticStore(clock, grids)
        self.table, self.owns_table = table, owns_table
        self.fingerprint = fingerprint
        self.step: StaticStep | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens and return the keys and values for the model's attention function (see `Step.append`).

        Raises:
            CacheError: there is no step: the model that runs is not the one that the compressor is attached to.
        """
        step, self.step = self.step, None
        if step is None:
            raise CacheError(NO_COMPRESSOR)
        return step.append(key_states, value_states)

    def allocate(self, latents: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Allocate for rows like those of a first forward (see `StaticStore.allocate`)."""
        self.store.allocate(latents, keys, values)
        self.batch_size, self.device, self.dtype = keys.shape[0], keys.device, keys.dtype
        self.is_initialized = True

    def get_seq_length(self, *_args: Any) -> int | Tensor:  # type: ignore[override]
        """Count the columns cached, on the device once there are some."""
        return self.clock.columns if self.clock.batch else 0

    def get_mask_sizes(self, *_args: Any) -> tuple[int, int]:
        """Return (keys that masks tell of, offset of the first): all that the cache can hold, from 0 on."""
        return self.clock.capacity, 0

    def get_max_cache_shape(self) -> int:
        """Return the columns that fit, under its name in older releases."""
        return self.clock.capacity

    def position_nbytes(self) -> int:
        """Count the bytes of the angles and of the lengths that this layer keeps."""
        angles = self.table.nbytes() if self.owns_table and self.table is not None else 0
        return angles + (self.clock.nbytes() if self.owns_clock else 0)

    def crop(self, *_args: Any) -> None:
        """Refuse: what was sealed has no exact keys any more, and the window would be short.

        Raises:
            CacheError: always.
        """
        raise CacheError("a static compressed cache cannot be cropped; use the default dynamic cache")

    def reset(self) -> None:
        """Forget everything. Memory stays where it is."""
        if self.owns_clock:
            self.clock.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the surviving beams."""
        self.store.reorder(beam_idx)
        if self.owns_clock:
            self.clock.reorder(beam_idx)
        if self.owns_table and self.table is not None:
            self.table.reorder(beam_idx)

    def offload(self) -> None:
        """Refuse: the compressed layer is small, and moving it is not implemented.

        Raises:
            CacheError: always.
        """
        raise CacheError("a compressed cache cannot be offloaded; use cache_implementation='dynamic' or 'static'")

    def prefetch(self) -> None:
        """Do nothing: nothing is ever offloaded."""

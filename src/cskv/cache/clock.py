"""How far the rows of a cache of fixed size are: numbers on the device, kept once for all layers of the cache.

Rows are counted from their first real token, so padding on the left is a number per row and no token of the cache. What
a step of one token per row needs follows from these numbers by arithmetic on the device: nothing in it depends on a
number that the host would have to know, so one captured step serves for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cskv.cache.bibranch import Tokens, sealed_tokens
from cskv.errors import CacheError


class Clock:
    """The lengths of all rows, and where the token of the step under way goes.

    Args:
        window, group, sinks: see `CSKVConfig`.
        capacity: columns of the model, padding included, that the cache can hold.

    Attributes:
        batch: rows; 0 until the first forward.
        padded: whether any row begins with padding.
        before: columns before the forward of several columns under way.
        leading: how many of its columns, the first ones, are no tokens of each row; empty where none are of any row.
        steps: counts forwards, but for those of compiled and replayed steps.
        packs: whether a step packs the blocks of latents that are under way. Whoever knows that no row completes one
            may turn it off for a step.
        heeds_mask: whether a step reads the model's mask. It hides nothing that these numbers do not hide, unless
            somebody has masked tokens of the prompt; whoever knows that nobody has may turn it off.
        row: (batch,): the rows' numbers.
        columns: (): columns cached.
        padding: (batch,): of each row.
        place: (batch,): of the step's token among the latents, which begin behind the sinks. Sinks go to the first
            place, and are overwritten there before it is read.
        slot: (batch,): of the step's token among the exact ones.
        sealed: (batch,): tokens that are read from latents.
        token: (batch, slots): which token of its row every exact one is, from 0.
        exists: (batch, slots): whether there is one, the step's own included.
    """

    row: Int[Tensor, " batch"]
    columns: Int[Tensor, ""]
    padding: Int[Tensor, " batch"]
    place: Int[Tensor, " batch"]
    slot: Int[Tensor, " batch"]
    sealed: Int[Tensor, " batch"]
    token: Int[Tensor, "batch slots"]
    exists: Bool[Tensor, "batch slots"]

    def __init__(self, window: int, group: int, sinks: int, capacity: int) -> None:
        self.window, self.group, self.sinks, self.capacity = window, group, sinks, capacity
        self.newest = window + group
        self.batch, self.padded = 0, False
        self.before = self.steps = 0
        self.leading: tuple[int, ...] = ()
        self.packs = self.heeds_mask = True
        self._held = 0  # columns that are held at least: compiled and replayed steps are not counted

    @property
    def slots(self) -> int:
        """Exact tokens: sinks, the most that are not sealed before a step, and its own."""
        return self.sinks + self.newest

    @property
    def most(self) -> int:
        """Tokens that are ever read from latents."""
        return self.due(self.capacity - 1)

    def due(self, columns: Tokens) -> Tokens:
        """Count the tokens that are read from latents by a forward after so many tokens of a row."""
        return sealed_tokens(columns - self.sinks, self.window, self.group)  # type: ignore[operator, return-value]

    def slots_of(self, token: Int[Tensor, "*tokens"]) -> Int[Tensor, "*tokens"]:
        """Return where tokens of a row are kept exactly."""
        behind = token - self.sinks
        return torch.where(behind < 0, token, self.sinks + behind % self.newest)

    def allocate(self, batch: int, device: torch.device) -> None:
        """Allocate what is on the device, for an empty cache."""
        self.columns = fixed((), torch.int64, device)
        for name in ("row", "padding", "place", "slot", "sealed"):
            setattr(self, name, fixed((batch,), torch.int64, device))
        self.token = fixed((batch, self.slots), torch.int64, device)
        self.exists = fixed((batch, self.slots), torch.bool, device)
        self.row.copy_(torch.arange(batch, device=device))
        self.batch = batch

    def lengths(self) -> list[int]:
        """Count the tokens of every row. It waits for the device."""
        return (self.columns - self.padding).tolist() if self.batch else []

    def tick(self) -> None:
        """Begin a step of one token per row.

        Raises:
            CacheError: the cache is full. A compiled or captured step cannot say so: its slot is out of range then.
        """
        if not torch.compiler.is_compiling() and not is_captured():
            self._fits(self._held + 1)
            self._held += 1
            self.steps += 1
        real = self.columns - self.padding
        behind = real - self.sinks
        place = torch.arange(self.slots, device=real.device)
        held = real[:, None] - (behind[:, None] - (place - self.sinks)) % self.newest
        is_sink = place < self.sinks
        self.place.copy_(behind.clamp(min=0))
        self.slot.copy_(torch.where(self.columns < self.capacity, self.slots_of(real), self.slots))
        self.sealed.copy_(self.due(real))
        self.token.copy_(torch.where(is_sink, place, held))
        unsealed = held >= self.sinks + self.sealed[:, None]
        self.exists.copy_(torch.where(is_sink, place <= real[:, None], unsealed))
        self.columns.add_(1)

    def extend(self, new: int, padding: Callable[[int], tuple[int, ...]]) -> None:
        """Begin a forward of several columns. It waits for the device.

        Args:
            new: columns.
            padding: counts how many of them, the first ones, are no tokens of each row, given the columns before them.

        Raises:
            CacheError: they do not fit, or rows are of different lengths already.
        """
        before = int(self.columns)
        self._fits(before + new)
        if self.padded and before and new > 1:
            raise CacheError(
                "rows of different padding in a static cache take one token at a time after the first forward; use the "
                "default dynamic cache for longer pieces"
            )
        leading = padding(before)
        self.before, self.leading = before, leading if any(leading) else ()
        if self.leading:
            self.padded = True
            self.padding.copy_(torch.tensor(leading))
        self.columns.add_(new)
        self._held = before + new
        self.steps += 1

    def clear(self) -> None:
        """Forget all tokens. No memory is freed or moved."""
        self.padded, self.before, self.leading, self._held = False, 0, (), 0
        if self.batch:
            self.columns.zero_()
            self.padding.zero_()

    def reorder(self, rows: Tensor) -> None:
        """Take the rows of an index, (batch,)."""
        self.padding.copy_(self.padding[rows])

    def nbytes(self) -> int:
        """Count the bytes allocated."""
        parts = (self.row, self.columns, self.padding, self.place, self.slot, self.sealed, self.token, self.exists)
        return sum(part.untyped_storage().nbytes() for part in parts) if self.batch else 0

    def _fits(self, columns: int) -> None:
        if columns > self.capacity:
            raise CacheError(
                f"the static cache holds {self.capacity} tokens, and {columns} are to be cached; make it with a larger "
                "max_cache_len"
            )


def fixed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros whose address captured and compiled steps may rely on, and that may be written in any mode."""
    with torch.inference_mode(False):
        zeros = torch.zeros(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(zeros)
    return zeros


def is_captured() -> bool:
    """Return whether the operations under way are being captured in a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

"""A token buffer that grows: amortised appends, bounded slack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cskv.scratch import allocate

GROWTH = 16  # a full buffer grows by 1/16: slack stays under 6.3 %, and a token is copied 16 times at most on average
LEAST_SLACK = 16  # tokens: short buffers do not reallocate at every step


class TokenBuffer:
    """Rows of (batch, tokens, channels), appended at the end of the token axis.

    Appending writes into spare capacity; only a full buffer is copied, into one that is 1/16 longer.

    Args:
        capacity: tokens to preallocate at the first append, so that nothing is copied before there are more.
        gpu_row_bytes: on a GPU, tokens start at multiples of so many bytes, which loads of that width need. The bytes
            between them are zeros, and slack.
    """

    def __init__(self, capacity: int = 0, gpu_row_bytes: int = 1) -> None:
        self._capacity = capacity
        self._gpu_row_bytes = gpu_row_bytes
        self._channels = 0
        self._storage: Tensor | None = None
        self.length = 0

    @property
    def tokens(self) -> Tensor:
        """(batch, length, channels): a view of what has been appended."""
        if self._storage is None:
            raise RuntimeError("the buffer is empty")
        return self._storage[:, : self.length, : self._channels]

    @property
    def padding(self) -> int:
        """Zeros in memory behind the channels of every token."""
        return 0 if self._storage is None else self._storage.shape[2] - self._channels

    def append(self, rows: Tensor) -> None:
        """Append (batch, new tokens, channels)."""
        end = self.length + rows.shape[1]
        if self._storage is None or end > self._storage.shape[1]:
            self._channels = rows.shape[2]
            self._reallocate(self._capacity if end <= self._capacity else grown(end), rows)
        self._storage[:, self.length : end, : self._channels] = rows  # type: ignore[index]
        self.length = end

    def put(self, row: int, start: int, tokens: Tensor, batch: int) -> None:
        """Write (new tokens, channels) into one row of `batch`, from `start` on. What other rows lack is zeros."""
        missing = start + tokens.shape[0] - self.length
        if missing > 0:
            self.append(tokens.new_zeros(batch, missing, tokens.shape[1]))
        self.tokens[row, start : start + tokens.shape[0]] = tokens

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. Their memory is kept for those that follow, unless it is too much."""
        self.length = min(self.length, length)
        # Half a growth step of tolerance: guesses that are appended and cropped at every step must not reallocate.
        tolerated = grown(self.length) + max(LEAST_SLACK, self.length // GROWTH) // 2
        if self._storage is not None and self._storage.shape[1] > max(tolerated, self._capacity):
            self._reallocate(max(grown(self.length), self._capacity), self._storage)

    def clear(self) -> None:
        """Forget everything, storage included."""
        self._storage = None
        self.length = 0

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by `change(storage)`, which may reorder, repeat, select or move rows of the batch."""
        if self._storage is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._storage = change(self._storage)

    def nbytes(self) -> int:
        """Count the bytes really allocated, slack included."""
        return 0 if self._storage is None else self._storage.untyped_storage().nbytes()

    def slack_nbytes(self) -> int:
        """Count the bytes allocated beyond the tokens held."""
        if self._storage is None:
            return 0
        held = self._storage.shape[0] * self.length * self._channels
        return self.nbytes() - held * self._storage.element_size()

    def _reallocate(self, capacity: int, like: Tensor) -> None:
        row = _row(self._channels, like.element_size(), self._gpu_row_bytes if like.is_cuda else 1)
        larger = allocate((like.shape[0], capacity, row), like.dtype, like.device)
        if not torch.compiler.is_compiling():  # or torch.compile would make a graph for every capacity
            torch._dynamo.maybe_mark_dynamic(larger, 1)
        larger[:, :, self._channels :] = 0
        if self._storage is not None:
            larger[:, : self.length] = self._storage[:, : self.length]
        self._storage = larger


def grown(length: int) -> int:
    """Return the capacity, in tokens, of a buffer that grows to hold `length`."""
    return length + max(LEAST_SLACK, length // GROWTH)


def _row(channels: int, itemsize: int, multiple: int) -> int:
    """Return the channels that a row needs to be a multiple of so many bytes long."""
    step = max(1, multiple // itemsize)
    return -(-channels // step) * step

"""Several texts in one row, told apart by positions that start again: training without padding, for FlashAttention."""

from __future__ import annotations

from torch import Tensor


def is_packed(positions: Tensor) -> bool:
    """Return whether (1, tokens) positions are of several texts: all start at the same one. It waits for the device."""
    return int((positions == positions.min()).sum()) > 1

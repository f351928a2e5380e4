"""Which of a batch's columns are padding on the left, read off the masks that transformers gives attention modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cskv.errors import UnsupportedModelError
from cskv.models.masks import written_out


def leading_padding(mask: Any, seen: int, new: int) -> tuple[int, ...]:
    """Count the leading columns of a forward that are no tokens of each row. It waits for the device.

    A token reads itself, whatever else its family hides, and nothing reads padding: so the diagonal tells.

    Args:
        mask: what an attention module is called with, of as many rows as the batch or of one for all: (batch, columns),
            with 0 for padding; (batch, heads or 1, new or 1, columns), boolean or added to logits; or a `BlockMask` of
            flex attention.
        seen: columns before the forward.
        new: columns of the forward.

    Raises:
        UnsupportedModelError: it is none of these.
    """
    total = seen + new
    if not isinstance(mask, Tensor):
        mask = _of_blocks(mask, new, total)
    if mask.ndim not in (2, 4) or mask.shape[-1] < total or (mask.ndim == 4 and mask.shape[2] not in (1, new)):
        raise UnsupportedModelError(
            f"attention got a mask of shape {tuple(mask.shape)} for {new} new of {total} tokens; expected (batch, "
            "tokens) or (batch, heads, new, tokens), to find the padding of each row by"
        )
    own = mask[..., seen:total]
    if mask.ndim == 4:
        own = own[:, 0, 0] if mask.shape[2] == 1 else own[:, 0].diagonal(dim1=1, dim2=2)
    is_added = own.is_floating_point() and mask.ndim == 4
    real = own > torch.finfo(own.dtype).min / 2 if is_added else own != 0
    return tuple((real.cumsum(1) == 0).sum(1).tolist())


def _of_blocks(mask: Any, new: int, total: int) -> Tensor:
    """Write a flex attention mask out, (batch, 1, new, total)."""
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(mask, BlockMask):
        raise UnsupportedModelError(f"attention got a {type(mask).__name__} for a mask; expected a tensor or BlockMask")
    return written_out(mask, 1, new, total)

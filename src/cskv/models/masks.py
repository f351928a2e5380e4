"""What attention functions are told of the tokens that queries read, by the implementation that a model uses.

    of pairs      sdpa, eager      None or (batch, heads or 1, new, tokens): what every query reads of every token
    of padding    FlashAttention   None or (batch, tokens): which are tokens; causal by itself, and `sliding_window`
    of blocks     flex attention   a `BlockMask`: a function of query and token, and the blocks that it leaves out

Attention on latents reads masks of pairs; the others are written out as one.
"""

from __future__ import annotations

import enum
import re
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

from cskv.errors import CacheError

KNOWN = "eager, sdpa, flash_attention_2 to 4, a FlashAttention kernel of the hub, flex_attention"
_FLASH = re.compile(r"flash_attention_\d+|[^/:]+/[^/:]*flash[^/:]*")  # the packages, and kernels: owner/name@revision


class MaskKind(enum.Enum):
    """What a mask is of."""

    PAIRS = "pairs"
    PADDING = "padding"
    BLOCKS = "blocks"


def mask_kind(implementation: str) -> MaskKind | None:
    """Return what the masks of an attention implementation are of, or None where that is not known."""
    if implementation in ("sdpa", "eager"):
        return MaskKind.PAIRS
    if implementation == "flex_attention":
        return MaskKind.BLOCKS
    is_flash = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation, None) is flash_attention_mask
    is_flash = is_flash and _FLASH.fullmatch(implementation) is not None
    return MaskKind.PADDING if is_flash else None


def of_pairs(mask: Any, kind: MaskKind, new: int, total: int, window: int | None = None) -> Tensor | None:
    """Write a mask out, (batch, heads or 1, new, total); None where every query reads all tokens up to its own.

    Args:
        mask: as the attention function gets it.
        kind: what it is of.
        new: queries, the last columns.
        total: columns.
        window: how many tokens a query reads at most, itself included; FlashAttention is told so beside the mask.

    Raises:
        CacheError: the mask is not of its kind, or of other columns.
    """
    if kind is MaskKind.PAIRS or (isinstance(mask, Tensor) and mask.ndim == 4 and kind is MaskKind.BLOCKS):
        return mask
    if kind is MaskKind.BLOCKS:
        return _of_blocks(mask, new, total)
    return _of_padding(mask, new, total, window)


def written_out(mask: Any, heads: int, new: int, total: int) -> Tensor:
    """Write a `BlockMask` out, (batch, heads, new, total), True where a query reads."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, mask.shape[0], heads, new, total, device=mask.kv_indices.device)


def _of_blocks(mask: Any, new: int, total: int) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(mask, BlockMask) or tuple(mask.shape[2:]) != (new, total):
        raise CacheError(
            f"flex attention got {_said(mask)} for {new} new of {total} tokens; expected a BlockMask of these"
        )
    return written_out(mask, mask.shape[1], new, total)


def _of_padding(mask: Any, new: int, total: int, window: int | None) -> Tensor | None:
    if mask is None and (window is None or total <= window):
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == total):
        raise CacheError(
            f"FlashAttention got {_said(mask)} for {new} new of {total} tokens; expected none, or (batch, {total}) "
            "with 0 for padding"
        )
    device = None if mask is None else mask.device
    column = torch.arange(total, device=device)
    reads = (column <= column[total - new :, None])[None]
    if mask is not None:
        reads = reads & (mask != 0)[:, None]
    if window is not None and total > window:  # tokens are counted without the padding between them
        place = column[None] if mask is None else (mask != 0).cumsum(1)
        reads = reads & (place[:, None] > place[:, total - new :, None] - window)
    return reads[:, None]


def _said(mask: Any) -> str:
    shape = getattr(mask, "shape", None)
    return "no mask" if mask is None else f"a {type(mask).__name__} of shape {shape and tuple(shape)}"

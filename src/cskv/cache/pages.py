"""Writing latents into pages: a token at a time, or a group of tokens at a time where its latents share a grid.

Page 0 belongs to nobody, as in vLLM: what must not be stored goes there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cskv.latents.pages import Pages
from cskv.quantization.dispatch import quantise


def is_grouped(pages: Pages) -> bool:
    """Whether blocks of the grid span several tokens, which have to be packed together."""
    return pages.grid is not None and pages.grid.block_tokens > 1


def store(pages: Pages, slots: Int[Tensor, " tokens"], latents: Float[Tensor, "tokens rank"]) -> None:
    """Store tokens one by one: plain latents, or packed ones whose blocks are of one token.

    Args:
        pages: of keys or values.
        slots: page * block_size + place in the page; a negative one stores nothing.
        latents: in their own dtype.
    """
    slots = slots.clamp(min=0)
    page, place = slots // pages.block_size, slots % pages.block_size
    if pages.grid is None:
        pages.data[page, place] = latents.to(pages.dtype)
        return
    packed = quantise(latents[None], pages.grid)
    pages.data[page, place] = packed.payload[0]
    _parameters(pages, page, place, packed.scales[0], packed.minima[0])


def seal(
    pages: Pages,
    page: Int[Tensor, " groups"],
    start: Int[Tensor, " groups"],
    latents: Float[Tensor, "groups group rank"],
) -> None:
    """Store whole groups of tokens, packed together.

    Args:
        pages: of keys or values, with a grid.
        page: where each group goes.
        start: its first token's place in the page, a multiple of the group.
        latents: of its tokens, in their own dtype.
    """
    if pages.grid is None or not len(page):
        return
    packed = quantise(latents, pages.grid)
    place = start[:, None] + torch.arange(latents.shape[1], device=start.device)
    pages.data[page[:, None], place] = packed.payload
    blocks = start[:, None] // pages.grid.block_tokens + torch.arange(packed.scales.shape[1], device=start.device)
    _parameters(pages, page[:, None], blocks, packed.scales, packed.minima)


def _parameters(pages: Pages, page: Tensor, row: Tensor, scales: Tensor, minima: Tensor) -> None:
    pages.scales[page, row] = scales  # type: ignore[index]
    pages.minima[page, row] = minima  # type: ignore[index]

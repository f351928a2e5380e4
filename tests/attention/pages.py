"""Requests of different lengths in pages, as a server's memory has them: shuffled, with garbage wherever nothing is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cskv.paged import PagedLatents, PageLayout, Pages
from cskv.quantization.grid import Grid, quantise
from cskv.view import Latents, PackedLatents, PlainLatents

UNUSED = 3  # pages that no request has


def memory(layout: PageLayout, block_size: int, pages: int, device: torch.device | str = "cpu") -> Tensor:
    """The memory of all pages, (pages, bytes), inside of larger blocks: bytes 255, which are NaN in every dtype."""
    size, room = layout.page_bytes(block_size), layout.page_bytes(block_size) + 48
    blocks = torch.full((pages * room + 16,), 255, dtype=torch.uint8, device=device)
    return blocks.as_strided((pages, size), (room, 1), 16)


def in_pages(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    layout: PageLayout,
    block_size: int,
    *,
    most: int | None = None,
    least: int = 0,
    names: torch.dtype = torch.int32,
    seed: int = 0,
) -> tuple[PagedLatents, PagedLatents]:
    """The keys' and values' latents of every request, (tokens, rank), in pages in no order."""
    device, counts = k[0].device, [-(-len(part) // block_size) for part in k]
    most = max(map(len, k)) if most is None else most
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(counts) + UNUSED, generator=generator)
    wide = torch.randint(len(order), (len(k), -(-most // block_size) + 3), generator=generator).to(names)
    table = wide[:, 1:-1]  # a part of a larger one
    pages = layout.pages(memory(layout, block_size, len(order), device), block_size)
    for row, (count, own) in enumerate(zip(counts, order[: sum(counts)].split(counts))):
        table[row, :count] = own
        for part, latents in zip(pages, (k[row], v[row])):
            write(part, own.tolist(), latents)
    # Two steps: a slice copied to another device would be packed together.
    table = wide.to(device)[:, 1:-1]
    lengths = torch.tensor([len(part) for part in k], dtype=names, device=device)
    return PagedLatents(pages[0], table, lengths, most, least), PagedLatents(pages[1], table, lengths, most, least)


def write(pages: Pages, names: Sequence[int], latents: Tensor) -> None:
    """One request's latents into its pages, token by token."""
    if not len(latents):
        return
    size, grid = pages.block_size, pages.grid
    quantised = None if grid is None else quantise(latents[None], grid)
    rows = latents if quantised is None else quantised.payload[0]
    for token, row in enumerate(rows):
        pages.data[names[token // size], token % size] = row
    if grid is not None and quantised is not None:
        in_page = size // grid.block_tokens
        for part, own in ((pages.scales, quantised.scales[0]), (pages.minima, quantised.minima[0])):
            for block, parameters in enumerate(own):
                part[names[block // in_page], block % in_page] = parameters


def by_itself(latents: Tensor, grid: Grid | None) -> Latents:
    """One request's latents, (tokens, rank), as if there were no others."""
    if grid is None:
        return PlainLatents(latents[None])
    return PackedLatents(*quantise(latents[None], grid), grid, latents.dtype)

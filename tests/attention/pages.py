"""Requests of different lengths in pages, as a server's memory has them: shuffled, with garbage wherever nothing is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cskv.latents.pages import PagedLatents, PageLayout, Pages
from cskv.latents.view import Latents, PackedLatents, PlainLatents
from cskv.quantization.grid import Grid, quantise

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
            write(part, own.to(device), latents)
    # Two steps: a slice copied to another device would be packed together.
    table = wide.to(device)[:, 1:-1]
    lengths = torch.tensor([len(part) for part in k], dtype=names, device=device)
    return PagedLatents(pages[0], table, lengths, most, least), PagedLatents(pages[1], table, lengths, most, least)


def write(pages: Pages, names: Tensor, latents: Tensor) -> None:
    """One request's latents into its pages: row i of what pages have n rows of is row i % n of page i // n."""
    if not len(latents):
        return
    parts = [(pages.data, latents)]
    if pages.grid is not None:
        quantised = quantise(latents[None], pages.grid)
        parts = list(zip((pages.data, pages.scales, pages.minima), (part[0] for part in quantised)))
    for part, rows in parts:
        row = torch.arange(len(rows), device=rows.device)
        part[names[row // part.shape[1]], row % part.shape[1]] = rows


def by_itself(latents: Tensor, grid: Grid | None) -> Latents:
    """One request's latents, (tokens, rank), as if there were no others."""
    if grid is None:
        return PlainLatents(latents[None])
    return PackedLatents(*quantise(latents[None], grid), grid, latents.dtype)

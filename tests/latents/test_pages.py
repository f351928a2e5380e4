"""Latents in pages are read as they were written, wherever the pages lie and whatever lies beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.errors import ConfigError
from cskv.latents.pages import PagedLatents, PageLayout, Pages
from cskv.latents.view import Latents
from cskv.quantization.grid import Grid
from cskv.scratch import Scratch
from tests.attention.pages import by_itself, in_pages, memory

PLAIN = PageLayout(14, 10, torch.float32)
PER_CHANNEL = PageLayout(14, 10, torch.float32, Grid.uniform(14, 4, (8, 1)), Grid.uniform(10, 8, (8, 1)))
PER_TOKEN = PageLayout(14, 40, torch.float32, Grid.uniform(14, 8, (1, 32)), Grid.uniform(40, 4, (1, 32)))
BOTH = PageLayout(13, 41, torch.bfloat16, Grid(((8, 3), (3, 10)), 4, 4), Grid.uniform(41, 4, (1, 32)))
LAYOUTS = {"plain": PLAIN, "per channel": PER_CHANNEL, "per token": PER_TOKEN, "mixed widths": BOTH}


def requests(layout: PageLayout, lengths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys' and values' latents of requests of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    k, v = (
        [torch.randn(length, rank, generator=generator).to(layout.dtype) for length in lengths]
        for rank in (layout.k_rank, layout.v_rank)
    )
    return k, v


def test_bytes_of_a_plain_page() -> None:
    """16 tokens of 14 and 10 numbers of 4 bytes: 896 and 640, both multiples of 16."""
    assert PLAIN.page_bytes(16) == 1536
    assert PageLayout(14, 10, torch.bfloat16).page_bytes(16) == 768
    assert PageLayout(3, 5, torch.bfloat16).page_bytes(3) == 32 + 32  # 18 and 30 bytes, rounded up


def test_bytes_of_a_packed_page() -> None:
    """16 tokens in 4 bits of 14 channels, 7 bytes, and 8 bits of 10: codes 112 and 160. Two groups of 8 tokens with 14
    scales of 2 bytes, 56, and 10, 40: rounded up 64 and 48, and as much for the minima.
    """
    assert PER_CHANNEL.page_bytes(16) == 112 + 160 + 2 * 64 + 2 * 48
    # Codes 14 and 20 bytes a token; one and two blocks of 32 channels: 32 and 64 bytes of scales.
    assert PER_TOKEN.page_bytes(16) == 224 + 320 + 2 * 32 + 2 * 64


def test_only_one_of_both_may_be_packed() -> None:
    layout = replace(PER_CHANNEL, v_grid=None)
    assert layout.page_bytes(16) == 112 + 640 + 2 * 64
    k, v = layout.pages(memory(layout, 16, 2), 16)
    assert (k.rank, v.rank, v.scales, v.minima) == (14, 10, None, None)


def test_a_page_that_groups_do_not_fit_into_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="a page of 20 tokens cannot hold groups of 8: give a block size that is a mu"
    ):
        PER_CHANNEL.page_bytes(20)
    with pytest.raises(ConfigError, match="a page of 4 tokens"):
        PER_CHANNEL.pages(torch.zeros(1, 4096, dtype=torch.uint8), 4)
    assert PER_TOKEN.page_bytes(20)  # every token is a group


def parts_of(pages: Pages) -> list[Tensor]:
    return [part for part in (pages.data, pages.scales, pages.minima) if part is not None]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_part_has_bytes_of_its_own_at_multiples_of_16(name: str) -> None:
    layout = LAYOUTS[name]
    storage = memory(layout, 16, 5)
    k, v = layout.pages(storage, 16)
    in_order = [k.data, v.data, *parts_of(k)[1:], *parts_of(v)[1:]]
    storage.zero_()
    for number, part in enumerate(in_order, start=1):
        assert part.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
        assert (part.data_ptr() - storage.data_ptr()) % 16 == 0
        assert part.stride(0) * part.element_size() == storage.stride(0)
        bytes_of = part.flatten(1).contiguous().view(torch.uint8)
        assert not bytes_of.any()  # no part before wrote into this one
        part.flatten(1).copy_(torch.full_like(bytes_of, number).view(part.dtype))
        assert int((storage == number).sum()) == bytes_of.numel()
    starts = [part.data_ptr() for part in in_order]
    assert starts == sorted(starts)
    assert starts[0] == storage.data_ptr()
    around = storage.as_strided((5, storage.stride(0)), (storage.stride(0), 1), 16)[:-1, storage.shape[1] :]
    assert (around == 255).all()  # what lies between pages is not theirs


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_token_is_where_the_layout_says(name: str) -> None:
    """By bytes: key latents first, a token's row after the other's."""
    layout, (k, v) = LAYOUTS[name], requests(LAYOUTS[name], [16])
    paged, _ = in_pages(k, v, layout, 16)
    page = int(paged.table[0, 0])
    alone = by_itself(k[0], layout.k_grid)
    rows = alone.tokens[0] if layout.k_grid is None else alone.payload[0]  # type: ignore[attr-defined]
    size = rows.view(torch.uint8).shape[1]
    first = paged.pages.data[page].data_ptr()
    start = (first - paged.pages.data.data_ptr()) // paged.pages.data.element_size()
    found = paged.pages.data.as_strided(
        (16, rows.shape[1]), (rows.shape[1], 1), start + paged.pages.data.storage_offset()
    )
    assert torch.equal(found.contiguous().view(torch.uint8), rows.view(torch.uint8))
    assert found[1].data_ptr() - found[0].data_ptr() == size


def check(paged: PagedLatents, alone: list[Latents | None], start: int, stop: int | None) -> None:
    """The range of every request, read together and one by one."""
    got = paged.read(start, stop)
    end = paged.length if stop is None else min(stop, paged.length)
    assert got.shape == (len(alone), max(0, end - start), paged.rank)
    assert got.dtype == paged.dtype
    for row, latents in zip(got, alone):
        own = 0 if latents is None else max(0, min(end, latents.length) - start)
        assert not row[own:].any()  # which is true of NaN
        if latents is not None and own:
            assert torch.equal(row[:own], latents.read(start, start + own)[0])


@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.sampled_from([8, 16, 24]),
    st.tuples(st.integers(0, 40), st.one_of(st.none(), st.integers(0, 60))),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([0, 5]),
)
def test_it_is_every_request_by_itself(
    name: str, lengths: list[int], block_size: int, bounds: tuple[int, int | None], names: torch.dtype, above: int
) -> None:
    layout, (start, size) = LAYOUTS[name], bounds
    k, v = requests(layout, lengths)
    pairs = in_pages(k, v, layout, block_size, most=max(lengths) + above, names=names)
    for paged, parts, grid in zip(pairs, (k, v), (layout.k_grid, layout.v_grid)):
        alone = [by_itself(part, grid) if len(part) else None for part in parts]
        assert (paged.length, paged.granularity) == (max(lengths) + above, block_size)
        check(paged, alone, start, None if size is None else start + size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_workspace_held_before_does_not_show(name: str) -> None:
    layout, scratch = LAYOUTS[name], Scratch()
    k, v = requests(layout, [37, 5])
    paged, _ = in_pages(k, v, layout, 16)
    first = paged.read(scratch=scratch).clone()
    for storage in scratch._storages.values():
        storage.fill_(float("nan") if storage.is_floating_point() else 255)
    assert torch.equal(paged.read(scratch=scratch), first)
    paged.read(16, 20, scratch)
    assert torch.equal(paged.read(scratch=scratch), first)


def test_no_token_is_looked_for_below_the_least_length() -> None:
    k, v = requests(PLAIN, [40, 33])
    paged, _ = in_pages(k, v, PLAIN, 16, least=33)
    nowhere = replace(paged, lengths=torch.zeros(2, dtype=torch.int32))  # is not asked for them
    assert torch.equal(nowhere.read(0, 33), paged.read(0, 33))
    assert torch.equal(paged.read(0, 33)[1], k[1])
    assert not nowhere.read(0, 34).any()
    assert not paged.read(30, 40)[1, 3:].any()


def test_a_table_that_is_too_narrow_is_refused() -> None:
    k, v = requests(PLAIN, [40, 33])
    paged, _ = in_pages(k, v, PLAIN, 16)
    with pytest.raises(ValueError, match="a table of 2 pages of 16 tokens holds no 40"):
        replace(paged, table=paged.table[:, :2])

"""Latents that are put into pages are read back as the grid gives them, to the bit, and nothing beside them changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.cache.pages import is_grouped, seal, store
from cskv.latents.pages import PagedLatents, PageLayout, Pages
from cskv.quantization.grid import Grid, dequantise, quantise
from tests.attention.pages import memory

RANK, PAGES, SIZE = 13, 6, 16  # latents, pages and the tokens of one

PER_TOKEN = [
    None,
    *(Grid.uniform(RANK, bits, (1, channels)) for bits in (3, 4, 8) for channels in (1, 5, 32)),
    Grid(((8, 2), (3, 11)), 1, 4),
]
# Grids, and the tokens that are packed together: one block of the grid, or several.
IN_GROUPS = [
    *((Grid.uniform(RANK, bits, (tokens, 1)), tokens) for bits in (3, 4, 8) for tokens in (2, 4, 8, 16)),
    *((Grid.uniform(RANK, bits, (tokens, 4)), 8) for bits in (3, 4, 8) for tokens in (1, 2, 4)),
    (Grid(((8, 2), (3, 11)), 4, 4), 8),
]
per_token, in_groups = st.sampled_from(PER_TOKEN), st.sampled_from(IN_GROUPS)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def pages_of(grid: Grid | None, dtype: torch.dtype) -> tuple[Pages, Tensor]:
    """Value pages with key pages before them, and the memory of both: bytes of 255, NaN in every dtype."""
    storage = memory(PageLayout(3, RANK, dtype, None, grid), SIZE, PAGES)
    return PageLayout(3, RANK, dtype, None, grid).pages(storage, SIZE)[1], storage


def latents(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(pages: Pages, page: int) -> Tensor:
    """All tokens of a page."""
    one = torch.tensor([[page]]), torch.tensor([SIZE])
    return PagedLatents(pages, *one, SIZE, SIZE).read()[0]


def on_grid(rows: Tensor, grid: Grid | None) -> Tensor:
    """(groups, tokens, rank), every group by itself."""
    return rows if grid is None else dequantise(*quantise(rows, grid), grid, None, rows.dtype)


@given(per_token, dtypes, st.lists(st.integers(-3, PAGES * SIZE - 1), max_size=40, unique=True), st.integers(0, 99))
def test_tokens_are_read_as_the_grid_gives_them(
    grid: Grid | None, dtype: torch.dtype, slots: list[int], seed: int
) -> None:
    pages, storage = pages_of(grid, dtype)
    before, rows = storage.clone(), latents(len(slots), RANK, dtype=dtype, seed=seed)
    store(pages, torch.tensor(slots, dtype=torch.int64), rows)
    expected = on_grid(rows[:, None], grid)[:, 0] if slots else rows
    for slot, row in zip(slots, expected):
        if slot > 0 or (slot == 0 and min(slots) == 0):  # what is not stored goes to the first place of page 0
            assert torch.equal(read(pages, slot // SIZE)[slot % SIZE], row)
    untouched = sorted(set(range(1, PAGES)) - {slot // SIZE for slot in slots if slot > 0})
    assert torch.equal(storage[untouched], before[untouched])
    written = torch.tensor([slot for slot in slots if slot >= 0], dtype=torch.int64)
    others = torch.ones(PAGES * SIZE, dtype=torch.bool).index_fill(0, written, False)
    others[0] = False
    codes = pages.data.flatten(0, 1)[others].contiguous().view(torch.uint8)
    assert (codes == 255).all()


@pytest.mark.parametrize("grid", [None, Grid.uniform(RANK, 4, (1, 32)), Grid.uniform(RANK, 8, (1, 1))])
def test_negative_slots_reach_nothing_but_page_0(grid: Grid | None) -> None:
    pages, storage = pages_of(grid, torch.float32)
    before = storage.clone()
    store(pages, torch.tensor([-1, -1, -7]), latents(3, RANK))
    assert torch.equal(storage[1:], before[1:])


def test_keys_beside_values_are_not_touched() -> None:
    layout = PageLayout(3, RANK, torch.float32, Grid.uniform(3, 4, (4, 1)), Grid.uniform(RANK, 4, (4, 1)))
    k, v = layout.pages(memory(layout, SIZE, PAGES), SIZE)
    seal(v, torch.tensor([2]), torch.tensor([4]), latents(1, 4, RANK))
    for part in (k.data, k.scales, k.minima):
        assert part is not None
        assert (part.contiguous().view(torch.uint8) == 255).all()


@given(in_groups, dtypes, st.data())
def test_groups_are_read_as_the_grid_gives_them(grouped: tuple[Grid, int], dtype: torch.dtype, data) -> None:
    grid, group = grouped
    places = [(page, start) for page in range(PAGES) for start in range(0, SIZE, group)]
    chosen = data.draw(st.lists(st.sampled_from(places), max_size=8, unique=True))
    pages, storage = pages_of(grid, dtype)
    before, rows = storage.clone(), latents(len(chosen), group, RANK, dtype=dtype, seed=len(chosen))
    page, start = torch.tensor(chosen, dtype=torch.int64).view(-1, 2).unbind(1)
    seal(pages, page, start, rows)
    expected = on_grid(rows, grid) if chosen else rows
    for (of, first), group_of in zip(chosen, expected):
        assert torch.equal(read(pages, of)[first : first + group], group_of)
    for of, first in set(places) - set(chosen):  # groups beside them in the same page as well
        blocks = slice(first // grid.block_tokens, (first + group) // grid.block_tokens)
        for part in (pages.data[of, first : first + group], pages.scales[of, blocks], pages.minima[of, blocks]):
            assert (part.contiguous().view(torch.uint8) == 255).all()
    untouched = sorted(set(range(PAGES)) - {of for of, _ in chosen})
    assert torch.equal(storage[untouched], before[untouched])


def test_a_group_is_packed_as_one() -> None:
    """By hand: 2 bits over a channel's 4 tokens; 1 / 2 is rounded to even."""
    grid = Grid.uniform(2, 2, (4, 1))
    layout = PageLayout(1, 2, torch.float32, None, grid)
    pages = layout.pages(memory(layout, 8, 3), 8)[1]
    rows = torch.tensor([[0.0, 10], [1, 10], [2, 10], [6, 10]])[None]
    seal(pages, torch.tensor([2]), torch.tensor([4]), rows)
    assert pages.data[2, 4:, 0].tolist() == [0b0000, 0b0000, 0b0001, 0b0011]
    assert (pages.scales[2, 1].tolist(), pages.minima[2, 1].tolist()) == ([2, 0], [0, 10])
    table, lengths = torch.tensor([[2]]), torch.tensor([8])
    assert PagedLatents(pages, table, lengths, 8).read(4)[0].tolist() == [[0, 10], [0, 10], [2, 10], [6, 10]]


@given(in_groups, st.integers(1, 4))
def test_groups_at_once_are_as_groups_one_by_one(grouped: tuple[Grid, int], count: int) -> None:
    grid, group = grouped
    rows = latents(count, group, RANK, seed=count)
    page, start = torch.arange(1, count + 1), torch.arange(count) * group % SIZE
    (together, storage), (alone, other) = pages_of(grid, torch.float32), pages_of(grid, torch.float32)
    seal(together, page, start, rows)
    for i in range(count):
        seal(alone, page[i : i + 1], start[i : i + 1], rows[i : i + 1])
    assert torch.equal(storage, other)


def test_which_pages_wait_for_groups() -> None:
    layouts = {None: False, Grid.uniform(RANK, 4, (1, 32)): False, Grid.uniform(RANK, 4, (2, 1)): True}
    for grid, grouped in layouts.items():
        assert is_grouped(pages_of(grid, torch.float32)[0]) == grouped

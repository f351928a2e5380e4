"""The store of fixed size: it reads what the growing one reads, from memory that never moves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.cache.bibranch import BiBranchStore
from cskv.cache.clock import Clock
from cskv.cache.static import StaticStore
from cskv.errors import CacheError
from cskv.latents.view import View
from cskv.quantization.grid import Grid

BATCH, HEADS, HEAD_DIM, K_RANK, V_RANK = 2, 2, 4, 3, 5
GRIDS = {
    "plain": (None, None),
    "groups": (Grid.uniform(K_RANK, 4, (4, 1)), Grid.uniform(V_RANK, 3, (2, 5))),
    "tokens": (Grid.uniform(K_RANK, 8, (1, K_RANK)), None),
}
CAPACITY = 64


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, keys and values of so many tokens."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (BATCH, count, K_RANK), (BATCH, count, V_RANK), *[(BATCH, HEADS, count, HEAD_DIM)] * 2
    k_latents, v_latents, keys, values = (torch.randn(shape, generator=draw) for shape in shapes)
    return k_latents, v_latents, keys, values


def part(all_tokens: tuple[Tensor, ...], row: int | slice, start: int, stop: int) -> list[Tensor]:
    rows = slice(row, row + 1) if isinstance(row, int) else row
    k_latents, v_latents, keys, values = (tensor[rows] for tensor in all_tokens)
    return [k_latents[:, start:stop], v_latents[:, start:stop], keys[:, :, start:stop], values[:, :, start:stop]]


def append(store: StaticStore, new: list[Tensor], padding: tuple[int, ...] = ()) -> View:
    """Tell the clock, then the store, as the layers of a cache do."""
    clock, count = store.clock, new[2].shape[2]
    if count == 1 and store.is_allocated:
        clock.tick()
        return store.append(*new)
    if not clock.batch:
        clock.allocate(new[2].shape[0], torch.device("cpu"))
    clock.extend(count, lambda _seen: padding)
    if not store.is_allocated:
        store.allocate((new[0], new[1]), new[2], new[3])
    return store.extend(*new)


def read(view: View, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a query of a row reads: latents of both kinds, and exact keys and values, each set in a fixed order."""
    keys, values, latents = view.keys[row], view.values[row], [torch.empty(0, K_RANK), torch.empty(0, V_RANK)]
    if view.exists is not None:
        keys, values = keys[:, view.exists[row]], values[:, view.exists[row]]
    if view.k is not None and view.v is not None:
        sealed = view.k.length if view.k.lengths is None else int(view.k.lengths[row])
        latents = [view.k.read()[row, :sealed], view.v.read()[row, :sealed]]
    order = keys[0, :, 0].argsort()
    return latents[0], latents[1], keys[:, order], values[:, order]


def same(ours: View, theirs: View, row: int, their_row: int) -> bool:
    return all(torch.equal(a, b) for a, b in zip(read(ours, row), read(theirs, their_row), strict=True))


@pytest.mark.parametrize("grids", list(GRIDS))
@given(
    window=st.integers(0, 6),
    sinks=st.integers(0, 5),
    pieces=st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 7, 20]), min_size=1, max_size=30),
)
def test_it_reads_what_a_growing_store_reads(grids: str, window: int, sinks: int, pieces: list[int]) -> None:
    while sum(pieces) > CAPACITY:
        pieces.pop()
    growing = BiBranchStore(window, 4, *GRIDS[grids], sinks=sinks)
    store, everything, start = StaticStore(Clock(window, 4, sinks, CAPACITY), GRIDS[grids]), tokens(CAPACITY, 1), 0
    for count in pieces:
        new = part(everything, slice(None), start, start + count)
        expected, view = growing.append(*new), append(store, new)
        assert all(same(view, expected, row, row) for row in range(BATCH)), (start, count)
        start += count
    assert store.length == start


@pytest.mark.parametrize("grids", list(GRIDS))
@pytest.mark.parametrize("padding", [(0, 5), (7, 2), (9, 0)])
def test_padded_rows_are_kept_as_they_would_be_alone(grids: str, padding: tuple[int, int]) -> None:
    prompt, total = 10, 40
    everything = tokens(total, 2)
    store = StaticStore(Clock(3, 4, 2, total), GRIDS[grids])
    append(store, part(everything, slice(None), 0, prompt), padding)
    alone = [BiBranchStore(3, 4, *GRIDS[grids], sinks=2) for _ in padding]
    for row, count in enumerate(padding):
        alone[row].append(*part(everything, row, count, prompt))
    for token in range(prompt, total):
        view = append(store, part(everything, slice(None), token, token + 1))
        for row in range(BATCH):
            assert same(view, alone[row].append(*part(everything, row, token, token + 1)), row, 0), (row, token)


@pytest.mark.parametrize("grids", list(GRIDS))
def test_no_tensor_moves_and_no_shape_changes(grids: str) -> None:
    store, everything = StaticStore(Clock(3, 4, 2, CAPACITY), GRIDS[grids]), tokens(CAPACITY, 3)
    append(store, part(everything, slice(None), 0, 9))

    def held(view: View) -> list[tuple[int, torch.Size]]:
        parts = [
            view.keys,
            view.values,
            view.exists,
            view.k.table,
            view.k.lengths,
            view.k.pages.data,
            view.v.pages.data,
        ]
        return [(tensor.data_ptr(), tensor.shape) for tensor in (*parts, *store.tensors())]

    views = [held(append(store, part(everything, slice(None), token, token + 1))) for token in range(9, CAPACITY)]
    assert all(before == after for before, after in pairwise(views))


def test_a_block_needs_packing_only_as_it_is_completed() -> None:
    everything, stores = tokens(40, 4), []
    for always in (True, False):
        store = StaticStore(Clock(0, 4, 1, 40), GRIDS["groups"])
        append(store, part(everything, slice(None), 0, 6))
        for token in range(6, 40):
            store.clock.packs = always or token % 2 == 0  # place token - 1 is the last of a block of 2, or of 4
            view = append(store, part(everything, slice(None), token, token + 1))
        stores.append(view)
    assert same(*stores, 0, 0)
    assert stores[0].k.lengths.tolist() == [36, 36]


def test_a_row_takes_all_that_another_held() -> None:
    everything = tokens(30, 5)
    store = StaticStore(Clock(2, 4, 1, 30), GRIDS["groups"])
    append(store, part(everything, slice(None), 0, 12), (3, 0))
    addresses = [tensor.data_ptr() for tensor in store.tensors()]
    store.reorder(torch.tensor([1, 1]))
    store.clock.reorder(torch.tensor([1, 1]))
    new = [torch.cat([tensor[1:], tensor[1:]]) for tensor in part(everything, slice(None), 12, 13)]
    view = append(store, new)
    assert same(view, view, 0, 1)
    assert store.clock.lengths() == [13, 13]
    assert [tensor.data_ptr() for tensor in store.tensors()] == addresses


def test_tokens_that_do_not_fit_are_refused() -> None:
    everything = tokens(20, 6)
    with pytest.raises(CacheError, match="holds 8 tokens, and 9 are to be cached; make it with a larger max_cache_len"):
        append(StaticStore(Clock(2, 4, 1, 8), GRIDS["plain"]), part(everything, slice(None), 0, 9))
    store = StaticStore(Clock(2, 4, 1, 8), GRIDS["plain"])
    append(store, part(everything, slice(None), 0, 7))
    append(store, part(everything, slice(None), 7, 8))
    with pytest.raises(CacheError, match="holds 8 tokens, and 9"):
        append(store, part(everything, slice(None), 8, 9))


def test_a_compiled_step_on_a_full_cache_has_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    everything, store = tokens(20, 6), StaticStore(Clock(2, 4, 1, 8), GRIDS["plain"])
    append(store, part(everything, slice(None), 0, 7))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    append(store, part(everything, slice(None), 7, 8))
    with pytest.raises(IndexError, match="out of bounds"):
        append(store, part(everything, slice(None), 8, 9))


def test_a_piece_after_padded_rows_is_refused() -> None:
    everything, store = tokens(20, 7), StaticStore(Clock(2, 4, 1, 20), GRIDS["plain"])
    append(store, part(everything, slice(None), 0, 7), (2, 0))
    with pytest.raises(CacheError, match="one token at a time"):
        append(store, part(everything, slice(None), 7, 9))


def test_a_cleared_clock_begins_anew_in_the_same_memory() -> None:
    everything, store = tokens(30, 8), StaticStore(Clock(2, 4, 1, 30), GRIDS["groups"])
    append(store, part(everything, slice(None), 0, 20), (5, 0))
    before = store.tensors()
    store.clock.clear()
    growing = BiBranchStore(2, 4, *GRIDS["groups"], sinks=1)
    for start, stop in ((20, 27), *pairwise(range(27, 31))):
        new = part(everything, slice(None), start, stop)
        view, expected = append(store, new), growing.append(*new)
        assert all(same(view, expected, row, row) for row in range(BATCH))
    assert all(a is b for a, b in zip(before, store.tensors(), strict=True))


@pytest.mark.parametrize("grids", list(GRIDS))
def test_bytes_are_those_of_all_tensors(grids: str) -> None:
    everything, store = tokens(40, 9), StaticStore(Clock(2, 4, 1, 40), GRIDS[grids])
    assert store.latent_nbytes().total == store.window_nbytes() == 0
    append(store, part(everything, slice(None), 0, 31))
    table = BATCH * 4  # one page a row
    held = sum(tensor.untyped_storage().nbytes() for tensor in store.tensors())
    assert store.latent_nbytes().total + store.window_nbytes() == held + table
    sealed = 28  # (31 - 1 - 2) // 4 * 4
    growing = BiBranchStore(2, 4, *GRIDS[grids], sinks=1)
    growing.append(*part(everything, slice(None), 0, 31))
    assert growing.sealed == sealed
    ours, theirs = store.latent_nbytes(), growing.latent_nbytes()
    assert (ours.payload, ours.scales, ours.minima) == (theirs.payload, theirs.scales, theirs.minima)

"""Stores of sealed latents: no way of filling changes a packed bit, and packed blocks are never touched again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.cache.latents import LatentStore, PackedStore, PlainStore, latent_store
from cskv.quantization.grid import Grid, dequantise, quantise

RANK = 7
grids = st.sampled_from(
    [
        Grid.uniform(RANK, 4, (4, 1)),
        Grid.uniform(RANK, 2, (1, 4)),
        Grid(((8, 2), (3, 5)), 4, 2),
        Grid.uniform(RANK, 3, (2, 7)),
    ]
)


def latents(length: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, RANK, generator=torch.Generator().manual_seed(seed))


def read(store: LatentStore, start: int, stop: int) -> Tensor:
    return store.view(stop).read(start)


def packed(store: PackedStore) -> list[Tensor]:
    return [buffer.tokens for buffer in (store._payload, store._scales, store._minima)]


def filled(grid: Grid, rows: Tensor, sizes: list[int]) -> PackedStore:
    store, start = PackedStore(grid), 0
    for size in sizes:
        store.append(rows[:, start : start + size])
        start += size
    return store


@given(grids, st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_groups_fill_it_bit_identically(grid: Grid, groups: list[int]) -> None:
    """Sealing brings whole groups of 4 tokens, one or several at a time."""
    rows = latents(4 * sum(groups))
    chunked, single, whole = (
        filled(grid, rows, sizes) for sizes in ([4 * g for g in groups], [4] * sum(groups), [rows.shape[1]])
    )
    for a, b, c in zip(packed(chunked), packed(single), packed(whole), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@given(grids, st.integers(1, 30), st.integers(0, 29), st.integers(1, 9))
def test_packed_blocks_are_never_touched_again(grid: Grid, length: int, kept: int, more: int) -> None:
    kept = min(kept, length)
    store = filled(grid, latents(length), [length])
    before = read(store, 0, length).clone()
    store.crop(kept)
    store.append(latents(more, seed=1))
    assert store.length == kept + more
    assert torch.equal(read(store, 0, kept), before[:, :kept])


@given(grids, st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_cut_block_ends_where_it_would_have(grid: Grid, first: int, kept: int, second: int, third: int) -> None:
    store = filled(grid, latents(first), [first])
    kept = min(kept, first)
    store.crop(kept)
    rows = latents(second, seed=1)
    store.append(rows)
    head = -kept % grid.block_tokens
    expected = [dequantise(*quantise(part, grid), grid) for part in (rows[:, :head], rows[:, head:]) if part.shape[1]]
    assert torch.equal(read(store, kept, kept + second), torch.cat(expected, dim=1))
    store.crop(max(0, store.length - third))
    store.append(latents(5, seed=2))
    assert read(store, 0, store.length).shape == (2, store.length, RANK)


@given(grids, st.integers(2, 40), st.data())
def test_any_range_of_tokens_can_be_read(grid: Grid, length: int, data) -> None:
    store = filled(grid, latents(length), [length])
    store.crop(data.draw(st.integers(1, length)))
    store.append(latents(6, seed=1))
    start = data.draw(st.integers(0, store.length - 1))
    stop = data.draw(st.integers(start + 1, store.length))
    assert torch.equal(read(store, start, stop), read(store, 0, store.length)[:, start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_come_back_in_their_dtype(dtype: torch.dtype) -> None:
    for store in (PlainStore(), PackedStore(Grid.uniform(RANK, 8, (4, 1)))):
        store.append(latents(8).to(dtype))
        assert read(store, 0, 8).dtype == dtype
        assert (read(store, 0, 8) - latents(8)).abs().max() < 0.05


def test_rows_of_the_batch_can_be_reordered_and_repeated() -> None:
    store = filled(Grid.uniform(RANK, 4, (4, 1)), latents(8), [8])
    before = read(store, 0, 8)
    store.map_batch(lambda rows: rows.index_select(0, torch.tensor([1, 1, 0])))
    assert store.batch == 3
    assert torch.equal(read(store, 0, 8), before[[1, 1, 0]])


def test_bytes_by_hand() -> None:
    store = filled(Grid.uniform(RANK, 4, (4, 1)), latents(64), [64])
    found = store.nbytes()
    assert found.payload == 2 * 64 * 4  # 7 codes of 4 bits in 4 bytes
    assert found.scales == found.minima == 2 * 16 * 7 * 2
    held = [buffer._storage.untyped_storage().nbytes() for buffer in (store._payload, store._scales, store._minima)]
    assert found.total == sum(held)


def test_a_cleared_store_starts_anew() -> None:
    for grid in (None, Grid.uniform(RANK, 4, (4, 1))):
        store = latent_store(grid)
        store.append(latents(8))
        store.clear()
        assert (store.length, store.batch, store.nbytes().total) == (0, 0, 0)
        store.append(latents(3))
        assert store.length == 3

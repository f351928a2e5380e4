"""The store of a padded batch: every row is kept as it would be alone, whatever its padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskv.cache.bibranch import BiBranchStore
from cskv.cache.ragged import RaggedStore
from cskv.latents.view import View
from cskv.quantization.grid import Grid

HEADS, HEAD_DIM, K_RANK, V_RANK = 2, 4, 3, 5
PADDING = -(2.0**90)  # what a column of padding holds: a finite number that must not be seen


def columns(rows: list[int], start: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, keys and values of columns, of rows of so much padding: entries are the row's own token numbers."""
    number = torch.arange(start, start + count)[None] - torch.tensor(rows)[:, None]
    number = torch.where(number < 0, PADDING, number + 1.0)
    latents = number[..., None] * torch.linspace(1, 2, K_RANK), -number[..., None] * torch.linspace(1, 2, V_RANK)
    heads = number[:, None, :, None].expand(-1, HEADS, count, HEAD_DIM)
    return *latents, heads, -heads


def read(view: View, row: int) -> tuple[list[int], list[float], list[float], list[float]]:
    """The exact keys of a row, then the first key and value latents, and all columns, sealed tokens first."""
    exact = torch.arange(view.keys.shape[2])
    sealed = torch.arange(view.sealed)
    found: list[int] = []
    if view.layout is not None:
        own = torch.from_numpy(view.layout.exact_columns())[row]
        of_sealed = torch.from_numpy(view.layout.sealed_columns())[row]
        exact, sealed = exact[own >= 0], sealed[of_sealed >= 0]
        found = (torch.cat([of_sealed[sealed], own[exact]]) - view.layout.rows[row].padding).tolist()
    k, v = ([] if part is None else part.read()[row, sealed, 0].tolist() for part in (view.k, view.v))
    assert view.values[row, 1, exact, 1].neg().tolist() == view.keys[row, 0, exact, 0].tolist()
    return found, view.keys[row, 0, exact, 0].tolist(), k, v


def test_rows_of_different_padding_by_hand() -> None:
    """Window 1, group 2, one sink: rows of 6 and 3 tokens, then two more of each."""
    store = RaggedStore(1, 2, sinks=1)
    store.expect((0, 3))
    first = store.append(*columns([0, 3], 0, 6))
    assert first.layout is None
    assert first.keys[:, 0, :, 0].tolist() == [[1, 2, 3, 4, 5, 6], [PADDING] * 3 + [1, 2, 3]]
    view = store.append(*columns([0, 3], 6, 1))
    # Row 0 has sealed tokens 2 to 5, row 1 (1 sink, then 2 of which the window keeps one) none.
    assert read(view, 0)[1:3] == ([1, 6, 7], [2, 3, 4, 5])
    assert read(view, 1)[1:3] == ([1, 2, 3, 4], [])
    view = store.append(*columns([0, 3], 7, 1))
    assert read(view, 0) == ([1, 2, 3, 4, 0, 5, 6, 7], [1, 6, 7, 8], [2, 3, 4, 5], [-2, -3, -4, -5])
    assert read(view, 1) == ([1, 2, 0, 3, 4], [1, 4, 5], [2, 3], [-2, -3])
    assert view.k.read()[1, 2:].abs().sum() == 0  # nothing of row 1, and no garbage


def test_a_row_of_padding_alone_begins_where_its_tokens_do() -> None:
    store = RaggedStore(0, 2, sinks=1)
    for start, padding in ((0, (0, 2)), (2, (0, 2))):
        store.expect(padding)
        store.append(*columns([0, 5], start, 2))
    assert store.awaits_tokens
    store.expect((0, 1))
    store.append(*columns([0, 5], 4, 2))
    assert not store.awaits_tokens
    view = store.append(*columns([0, 5], 6, 1))
    assert read(view, 0)[1:3] == ([1, 6, 7], [2, 3, 4, 5])
    assert read(view, 1)[1:3] == ([1, 2], [])


operations = st.lists(
    st.tuples(st.sampled_from(["append", "append", "crop", "reorder"]), st.integers(1, 9)), min_size=1, max_size=10
)
GRIDS: list[dict[str, Any]] = [
    {},
    {"k_grid": Grid.uniform(K_RANK, 4, (2, 1)), "v_grid": Grid.uniform(V_RANK, 4, (1, 4))},
    {"k_grid": Grid.uniform(K_RANK, 3, (4, 1)), "v_grid": Grid.uniform(V_RANK, 8, (2, 4))},
]


@settings(max_examples=30)
@pytest.mark.parametrize("grids", GRIDS, ids=["plain", "packed", "blocks of different tokens"])
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=4),
    st.integers(1, 9),
    operations,
    st.integers(0, 5),
    st.sampled_from([4, 8]),
    st.integers(0, 6),
)
def test_every_row_is_kept_as_alone(
    grids: dict[str, Grid],
    padding: list[int],
    least: int,
    operations: list[tuple[str, int]],
    window: int,
    group: int,
    sinks: int,
) -> None:
    """Whatever is appended, cropped (into sealed blocks and sinks too) and reordered."""
    total = max(padding) + least
    batch = RaggedStore(window, group, sinks=sinks, **grids)
    batch.expect(tuple(padding))
    batch.append(*columns(padding, 0, total))
    alone = [BiBranchStore(window, group, sinks=sinks, **grids) for _ in padding]
    for store, own in zip(alone, padding):
        store.append(*columns([0], 0, total - own))
    for kind, number in [*operations, ("append", 1)]:
        if kind == "append":
            view = batch.append(*columns(padding, total, number))
            for row, (store, own) in enumerate(zip(alone, padding)):
                expected = store.append(*columns([0], total - own, number))
                found = read(view, row)
                assert sorted(found[0]) == list(range(store.length))
                assert found[1:] == read(expected, 0)[1:]
            total += number
        elif kind == "crop":
            total = max(total - number, max(padding) + 1)
            batch.crop(total)
            for store, own in zip(alone, padding):
                store.crop(total - own)
        else:
            order = [(row * number) % len(padding) for row in range(len(padding))]
            batch.map_batch(lambda rows, order=order: rows.index_select(0, torch.tensor(order)))
            padding = [padding[row] for row in order]
            alone = [copy.deepcopy(alone[row]) for row in order]


def test_a_crop_to_nothing_and_a_selection() -> None:
    store = RaggedStore(0, 2, sinks=1)
    store.expect((0, 3))
    store.append(*columns([0, 3], 0, 6))
    store.append(*columns([0, 3], 6, 1))
    store.map_batch(lambda rows: rows[torch.tensor([1])])
    view = store.append(*columns([3], 7, 1))
    assert read(view, 0)[1:3] == ([1, 4, 5], [2, 3])
    assert view.sealed == 2
    assert store.nbytes() == store.latent_nbytes().total + sum(p.untyped_storage().nbytes() for p in store._exact)
    store.crop(0)
    assert (store.length, store.sealed) == (0, 0)
    assert store.awaits_tokens
    store.clear()
    store.map_batch(lambda rows: rows.index_select(0, torch.tensor([0])))  # of nothing
    assert store.nbytes() == 0

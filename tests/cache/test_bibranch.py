"""The bi-branch store: which tokens are read from where, and that no way of filling it changes that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.cache.bibranch import BiBranchStore, View, sealed_tokens

BATCH, HEADS, HEAD_DIM, K_RANK, V_RANK = 2, 2, 4, 3, 5


def tokens(start: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, keys and values whose entries are the token's number (values: negated)."""
    number = torch.arange(start, start + count).float()
    latents = number[None, :, None].expand(BATCH, count, K_RANK), -number[None, :, None].expand(BATCH, count, V_RANK)
    heads = number[None, None, :, None].expand(BATCH, HEADS, count, HEAD_DIM)
    return *latents, heads, -heads


def fill(store: BiBranchStore, sizes: list[int]) -> View:
    view, total = None, store.length
    for size in sizes:
        view = store.append(*tokens(total, size))
        total += size
    assert view is not None
    return view


def read_from(view: View) -> tuple[list[int], list[int]]:
    """The numbers of the tokens in the compressed and in the exact branch."""
    compressed, exact = [], view.keys[0, 0, :, 0].int().tolist()
    if view.sealed:
        compressed = view.k.read()[0, :, 0].int().tolist()
        assert view.v.read()[1, :, 0].int().neg().tolist() == compressed
    assert view.values[1, 1, :, 0].int().neg().tolist() == exact
    return compressed, exact


@pytest.mark.parametrize(
    ("window", "group", "cached", "sealed"),
    # The official rule, window 0: the first (s // g) * g of s cached tokens are compressed.
    [(0, 1, 7, 7), (0, 4, 3, 0), (0, 4, 4, 4), (0, 4, 7, 4), (0, 32, 70, 64), (3, 4, 6, 0), (3, 4, 7, 4), (5, 1, 9, 4)],
)
def test_what_the_next_forward_reads(window: int, group: int, cached: int, sealed: int) -> None:
    store = BiBranchStore(window, group)
    fill(store, [cached])
    compressed, exact = read_from(fill(store, [2]))
    assert compressed == list(range(sealed))
    assert exact == list(range(sealed, cached + 2))


@pytest.mark.parametrize(
    ("sinks", "cached", "sealed"),
    # Window 3, group 4: the rule of no sinks, of that many tokens fewer.
    [(1, 7, []), (1, 8, [1, 2, 3, 4]), (4, 10, []), (4, 11, [4, 5, 6, 7]), (4, 18, [4, 5, 6, 7, 8, 9, 10, 11])],
)
def test_the_first_tokens_are_never_sealed(sinks: int, cached: int, sealed: list[int]) -> None:
    store = BiBranchStore(3, 4, sinks=sinks)
    fill(store, [cached])
    compressed, exact = read_from(fill(store, [2]))
    assert compressed == sealed
    assert exact == [token for token in range(cached + 2) if token not in sealed]  # sinks first


def test_more_sinks_than_tokens_seal_nothing() -> None:
    store = BiBranchStore(0, 1, sinks=9)
    assert read_from(fill(store, [5, 1, 1])) == ([], list(range(7)))
    assert store.window_nbytes() == BATCH * 7 * 2 * HEADS * HEAD_DIM * 4  # and have no latents to come
    assert read_from(fill(store, [2, 1, 1])) == ([9], [*range(9), 10])


@pytest.mark.parametrize(
    ("length", "sealed", "exact"),
    # Of 12 tokens 2 are sinks and 8 are sealed.
    [(11, 8, [0, 1, 10]), (10, 8, [0, 1]), (7, 5, [0, 1]), (2, 0, [0, 1]), (1, 0, [0]), (0, 0, [])],
)
def test_a_crop_into_and_before_the_sinks(length: int, sealed: int, exact: list[int]) -> None:
    store = BiBranchStore(0, 4, sinks=2)
    fill(store, [12, 1])
    store.crop(12)
    assert store.sealed == 8
    store.crop(length)
    assert (store.length, store.sealed) == (length, sealed)
    assert store._exact.keys[0, 0, :, 0].int().tolist() == exact
    compressed, held = read_from(fill(store, [1]))
    assert compressed == list(range(2, 2 + sealed))
    assert held == [*exact, length]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=14),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(0, 6),
)
def test_appends_and_crops_leave_every_token_where_plain_counting_has_it(
    operations: list[tuple[bool, int]], window: int, group: int, sinks: int
) -> None:
    store, sealed = BiBranchStore(window, group, sinks=sinks), set[int]()

    def seal(certain: int) -> None:
        whole_groups = (certain - sinks - window) // group * group
        sealed.update(token for token in range(sinks, certain) if token - sinks < whole_groups)

    for is_crop, number in [*operations, (False, 1), (False, 1)]:
        if is_crop:
            store.crop(max(0, store.length - number))
            sealed = {token for token in sealed if token < store.length}
            continue
        before = store.length
        seal(before)
        compressed, exact = read_from(fill(store, [number]))
        assert compressed == sorted(sealed)
        assert exact == [token for token in range(store.length) if token not in sealed]
        seal(before + 1 if before else number)  # all but one of a later piece may be guesses


def test_a_prefill_reads_nothing_compressed() -> None:
    compressed, exact = read_from(fill(BiBranchStore(0, 4), [19]))
    assert compressed == []
    assert exact == list(range(19))


sizes_lists = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(sizes_lists, st.integers(0, 6), st.integers(1, 6), st.integers(0, 6))
def test_no_way_of_filling_changes_what_is_read(sizes: list[int], window: int, group: int, sinks: int) -> None:
    total = sum(sizes)
    chunked, single, whole = (BiBranchStore(window, group, sinks=sinks) for _ in range(3))
    fill(chunked, sizes)
    fill(single, [1] * total)
    fill(whole, [total])
    views = [read_from(fill(store, [1])) for store in (chunked, single, whole)]
    assert views[0] == views[1] == views[2]
    until = sinks + max(0, total - sinks - window) // group * group
    assert views[0] == (list(range(sinks, until)), [t for t in range(total + 1) if not sinks <= t < until])


@given(sizes_lists, st.integers(0, 6), st.integers(1, 6))
def test_between_forwards_no_old_token_is_held_exactly(sizes: list[int], window: int, group: int) -> None:
    store = BiBranchStore(window, group)
    total = 0
    for size in sizes:
        before, total = total, total + size
        fill(store, [size])
        held = store.window_nbytes() // (BATCH * (2 * HEADS * HEAD_DIM + K_RANK + V_RANK) * 4)
        undoable = size - 1 if before else 0  # all of these sizes may be guesses
        assert held <= window + group - 1 + undoable


@given(st.integers(1, 40), st.integers(1, 24), st.integers(0, 24), st.integers(0, 6), st.integers(1, 6))
def test_a_rejected_guess_leaves_no_trace(prompt: int, guess: int, accepted: int, window: int, group: int) -> None:
    accepted = min(accepted, guess - 1) + 1  # a verification always accepts at least the token fed before the guess
    guessed, straight = BiBranchStore(window, group), BiBranchStore(window, group)
    fill(guessed, [prompt, guess])
    guessed.crop(prompt + accepted)
    fill(straight, [prompt, accepted])
    assert guessed.length == straight.length
    assert read_from(fill(guessed, [1])) == read_from(fill(straight, [1]))


@given(st.integers(1, 40), st.integers(1, 24), st.integers(0, 24), st.integers(0, 6), st.integers(1, 6))
def test_a_guess_in_the_first_forward_leaves_no_trace_where_it_is_told(
    prompt: int, guess: int, accepted: int, window: int, group: int
) -> None:
    accepted = min(accepted, guess)
    guessed, straight = BiBranchStore(window, group), BiBranchStore(window, group)
    guessed.append(*tokens(0, prompt + guess), guessed=guess)
    guessed.crop(prompt + accepted)
    fill(straight, [prompt + accepted])
    assert read_from(fill(guessed, [1])) == read_from(fill(straight, [1]))


def test_a_longer_piece_keeps_no_more_than_the_window() -> None:
    store = BiBranchStore(window=8, group=4)
    fill(store, [10, 65])
    assert store.length - store.sealed == 8 + (75 - 8) % 4


@given(st.integers(2, 40), st.integers(1, 39), st.integers(0, 6), st.integers(1, 6))
def test_a_crop_into_sealed_tokens_keeps_every_token_once(total: int, length: int, window: int, group: int) -> None:
    length = min(length, total - 1)
    store = BiBranchStore(window, group)
    fill(store, [total])
    store.crop(length)
    compressed, exact = read_from(fill(store, [3]))
    assert compressed + exact == list(range(length + 3))


def test_bytes_are_those_of_the_tensors_held() -> None:
    store = BiBranchStore(window=2, group=3)
    fill(store, [50, 1, 1])
    held = [store._k._tokens._storage, store._v._tokens._storage, *store._exact]
    assert store.nbytes() == sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert store.latent_nbytes().payload == BATCH * store.sealed * (K_RANK + V_RANK) * 4
    assert store.sealed == 48  # of 52, 2 in the window and 2 that do not fill a group


def test_batch_changes_reach_both_branches() -> None:
    store = BiBranchStore(window=2, group=2)
    k_latents, v_latents, keys, values = (part.clone() for part in tokens(0, 9))
    for part in (k_latents, v_latents, keys, values):
        part[1] += 100
    store.append(k_latents, v_latents, keys, values)
    store.map_batch(lambda rows: rows.index_select(0, torch.tensor([1, 0])))
    view = store.append(*tokens(9, 1))
    assert view.k.read()[0, :, 0].tolist() == [100.0 + i for i in range(6)]
    assert view.keys[0, 0, :3, 0].tolist() == [106.0, 107.0, 108.0]
    assert view.keys[1, 0, :3, 0].tolist() == [6.0, 7.0, 8.0]


def test_cleared_store_starts_anew() -> None:
    store = BiBranchStore(window=2, group=2)
    fill(store, [9])
    store.clear()
    assert (store.length, store.sealed, store.nbytes()) == (0, 0, 0)
    assert read_from(fill(store, [5])) == ([], list(range(5)))


@pytest.mark.parametrize(
    ("length", "window", "group", "sealed"),
    [
        (0, 0, 1, 0),
        (7, 0, 1, 7),
        (7, 0, 4, 4),
        (8, 0, 4, 8),
        (3, 5, 1, 0),
        (6, 5, 1, 1),
        (70, 3, 32, 64),
        (66, 3, 9, 63),
    ],
)
def test_sealed_tokens_are_whole_groups_outside_the_window(length: int, window: int, group: int, sealed: int) -> None:
    """Of one number, an array and a tensor alike."""
    assert sealed_tokens(length, window, group) == sealed
    assert sealed_tokens(np.array([length, 0]), window, group).tolist() == [sealed, 0]
    assert sealed_tokens(torch.tensor([length, 0]), window, group).tolist() == [sealed, 0]

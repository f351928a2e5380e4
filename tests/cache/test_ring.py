"""The rings of exact tokens and the sinks before them, beside a model that keeps every token there ever was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.cache.bibranch import BiBranchStore
from cskv.cache.ring import Ring

HEADS, DIM, K_RANK, V_RANK, PAGES = 2, 3, 5, 4, 7
RING = Ring(window=3, group=4, kv_heads=HEADS, head_dim=DIM, k_waiting=0, v_waiting=0, dtype=torch.float32)
rings = st.builds(
    lambda window, group, k, v, sinks: replace(RING, window=window, group=group, k_waiting=k, v_waiting=v, sinks=sinks),
    st.integers(0, 6),
    st.integers(1, 6),
    st.sampled_from([0, K_RANK]),
    st.sampled_from([0, V_RANK]),
    st.sampled_from([0, 0, 1, 4, 40]),
).filter(lambda ring: ring.slots > 0)


def garbage(ring: Ring, pages: int = PAGES) -> tuple[Tensor, Tensor]:
    """Rings of NaN inside of larger blocks, and the memory of these."""
    blocks = torch.full((pages, ring.page_bytes + 48), 255, dtype=torch.uint8)
    return ring.rings(blocks[:, 16 : 16 + ring.page_bytes]), blocks


def test_bytes_by_hand() -> None:
    """Window 3 and groups of 4 leave 6 tokens at most: of 2 * 2 heads of 3 numbers, and of latents that wait."""
    assert RING.slots == 6
    assert RING.page_bytes == 6 * 12 * 4
    assert replace(RING, k_waiting=5).page_bytes == 6 * 17 * 4 + 8  # 408, up to a multiple of 16
    assert replace(RING, k_waiting=5, v_waiting=4, dtype=torch.bfloat16).page_bytes == 6 * 21 * 2 + 4
    assert replace(RING, window=0, group=1).page_bytes == 0  # nothing is kept exactly
    assert replace(RING, window=0, group=1, sinks=4).page_bytes == 4 * 12 * 4
    assert replace(RING, sinks=4, k_waiting=5).page_bytes == 10 * 17 * 4 + 8  # sinks have room for latents as well
    assert replace(RING, window=32, group=32, kv_heads=8, head_dim=128, dtype=torch.float16).page_bytes == 63 * 2048 * 2


def test_places_by_hand() -> None:
    """Four sinks have the first places for good; the others take the six behind them by turns."""
    position = torch.arange(18).view(2, 9)
    assert replace(RING, sinks=4).places(position).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [9, 4, 5, 6, 7, 8, 9, 4, 5],
    ]
    assert RING.places(position).tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2], [3, 4, 5, 0, 1, 2, 3, 4, 5]]
    assert replace(RING, window=0, group=1, sinks=4).places(torch.arange(4)).tolist() == [0, 1, 2, 3]


@given(rings, st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_there_is_a_place_for_all_that_a_store_does_not_seal(ring: Ring, sizes: list[int]) -> None:
    store, length = BiBranchStore(ring.window, ring.group), 0
    for size in sizes:
        parts = torch.zeros(1, size, K_RANK), torch.zeros(1, size, V_RANK)
        view = store.append(*parts, *[torch.zeros(1, HEADS, size, DIM)] * 2)
        assert length - view.sealed <= ring.slots - ring.sinks
        length += size


def exact(ring: Ring, held: Tensor, page: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact tokens of requests of `length` tokens, and which of them there are."""
    sealed = (length - ring.sinks - ring.window).clamp(min=0) // ring.group * ring.group
    place = torch.arange(ring.slots)
    position = place + (place >= ring.sinks) * sealed[:, None]
    exists = position < length[:, None]
    return *ring.exact(held, page, position, exists), exists


Token = tuple[int, int, tuple[Tensor, ...]]  # page, position and parts


class Model:
    """One request: every token that it ever had."""

    def __init__(self, page: int) -> None:
        self.page, self.tokens = page, dict[int, tuple[Tensor, ...]]()

    @property
    def length(self) -> int:
        return len(self.tokens)

    def grow(self, count: int, generator: torch.Generator) -> list[Token]:
        """Page, position and parts of new tokens."""
        new = []
        for position in range(self.length, self.length + count):
            shapes = (HEADS, DIM), (HEADS, DIM), (K_RANK,), (V_RANK,)
            self.tokens[position] = tuple(torch.randn(shape, generator=generator) for shape in shapes)
            new.append((self.page, position, self.tokens[position]))
        return new


def newest(ring: Ring, tokens: list[Token]) -> list[Token]:
    """Those of new tokens that a ring is to hold."""
    last = len(tokens) - (ring.slots - ring.sinks)
    return [token for i, token in enumerate(tokens) if token[1] < ring.sinks or i >= last]


def check(ring: Ring, held: Tensor, models: list[Model]) -> None:
    page = torch.tensor([model.page for model in models])
    length = torch.tensor([model.length for model in models])
    keys, values, exists = exact(ring, held, page, length)
    assert keys.shape == values.shape == (len(models), HEADS, ring.slots, DIM)
    for row, model in enumerate(models):
        due = max(0, model.length - ring.sinks - ring.window) // ring.group * ring.group
        positions = [p for p in range(model.length) if not ring.sinks <= p < ring.sinks + due]
        expected = [model.tokens[position] for position in positions]
        assert exists[row].tolist() == [i < len(expected) for i in range(ring.slots)]
        assert not keys[row, :, len(expected) :].any()  # which is true of NaN
        assert not values[row, :, len(expected) :].any()
        for i, (key, value, k, v) in enumerate(expected):
            assert torch.equal(keys[row, :, i], key)
            assert torch.equal(values[row, :, i], value)
            token = ring.tokens(held, page[row : row + 1], torch.tensor([[positions[i]]]))
            waiting = token[0, 0, 2 * HEADS * DIM :]
            assert torch.equal(waiting, torch.cat([k[: ring.k_waiting], v[: ring.v_waiting]]))


@given(rings, st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 5, 13]), min_size=3, max_size=3), max_size=8))
def test_a_ring_is_all_tokens_that_are_not_sealed(ring: Ring, steps: list[list[int]]) -> None:
    """Requests take turns, get tokens one by one or many at once, and pages that others left full of their own."""
    generator = torch.Generator().manual_seed(len(steps))
    held, blocks = garbage(ring)
    models = [Model(page) for page in (4, 1, 6)]
    for number, sizes in enumerate(steps):
        check(ring, held, models)
        new = [token for model, size in zip(models, sizes) for token in newest(ring, model.grow(size, generator))]
        if new:
            page, position, parts = zip(*new)
            columns = [torch.stack(column) for column in zip(*parts)]
            ring.write(held, torch.tensor(page), torch.tensor(position), tuple(columns))
        check(ring, held, models)
        if number % 4 == 3:  # one ends, and another one gets its page
            models[number % 3] = Model(models[number % 3].page)
    untouched = [0, 2, 3, 5]
    assert (blocks[untouched] == 255).all()
    assert (blocks[:, :16] == 255).all()
    assert (blocks[:, 16 + ring.page_bytes :] == 255).all()


def test_the_oldest_come_first() -> None:
    """By hand: of 12 tokens, with window 3 and groups of 4, 8 are sealed; tokens 8 to 11 are in places 2 to 5."""
    held, _ = garbage(RING)
    position = torch.arange(6, 12)
    numbers = position.float()[:, None, None].expand(-1, HEADS, DIM)
    nothing = torch.zeros(6, K_RANK), torch.zeros(6, V_RANK)
    RING.write(held, torch.full((6,), 2), position, (numbers, -numbers, *nothing))
    assert held[2, :, 0].tolist() == [6, 7, 8, 9, 10, 11]
    keys, values, exists = exact(RING, held, torch.tensor([2]), torch.tensor([12]))
    assert keys[0, 1, :, 2].tolist() == [8, 9, 10, 11, 0, 0]
    assert values[0, 0, :, 0].tolist() == [-8, -9, -10, -11, 0, 0]
    assert exists.tolist() == [[True, True, True, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_request_has_no_exact_tokens(dtype: torch.dtype) -> None:
    held, _ = garbage(replace(RING, dtype=dtype))
    keys, values, exists = exact(replace(RING, dtype=dtype), held, torch.tensor([3]), torch.tensor([0]))
    assert not exists.any()
    assert not keys.any()
    assert not values.any()

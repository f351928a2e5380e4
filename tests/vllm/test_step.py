"""What a step seals and keeps, by hand and beside a model that goes through all tokens one by one."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv.cache.ring import Ring
from cskv.vllm.step import Prefill, Step, plan_step


def plan(new: list[int], lengths: list[int], window: int, group: int, sinks: int = 0, blocks: int = 5) -> Step:
    """A step that brings `new` tokens, after which requests have `lengths`; the batch has 3 tokens of padding."""
    starts = np.array(list(accumulate(new, initial=0)), dtype=np.int64)
    table = torch.arange(len(new) * blocks, dtype=torch.int32).view(len(new), blocks)
    slots = torch.arange(100, 100 + sum(new) + 3)
    sizes = {"window": window, "group": group, "sinks": sinks}
    return plan_step(starts, np.array(lengths, dtype=np.int64), table, slots, 16, **sizes)


def test_decodes_and_prefills_by_hand() -> None:
    """Window 4, groups of 2. Two requests decode, the second with less than a window. The third begins its prompt, the
    fourth goes on: 9 tokens are there, of which 4 are sealed, and 6 come.
    """
    step = plan([1, 1, 5, 6], [10, 4, 5, 15], window=4, group=2)
    assert (step.tokens, step.decodes) == (13, 2)
    assert step.prefills == (Prefill(2, slice(2, 7), 0, 0), Prefill(3, slice(7, 13), 9, 4))
    assert step.start.tolist() == [0, 1, 2, 7]
    assert step.length.tolist() == [9, 3, 0, 9]
    assert step.sealed.tolist() == [4, 0, 0, 4]
    assert (step.most, step.least) == (4, 0)
    # After it 10, 4, 5 and 15 are there: 6, 0, 0 and 10 are sealed.
    assert step.groups.request.tolist() == [0, 3, 3, 3]
    assert step.groups.first.tolist() == [4, 4, 6, 8]
    # A ring has 5 places. Before the step 9, 3, 0 and 9 tokens are there, of which 4, 0, 0 and 4 are not read from it.
    assert step.exact.position.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert step.exact.exists.sum(1).tolist() == [5, 3, 0, 5]
    assert step.kept.row.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert step.kept.request.tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert step.kept.position.tolist() == [9, 3, 0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_sinks_by_hand() -> None:
    """Window 2, groups of 2, 3 sinks. Two requests decode, the second while it has sinks alone. The third begins its
    prompt, the fourth goes on from 2 tokens and the fifth from 12, of which 6 behind the sinks are sealed.
    """
    step = plan([1, 1, 2, 6, 3], [12, 2, 2, 8, 15], window=2, group=2, sinks=3)
    assert (step.sinks, step.decodes) == (3, 2)
    assert step.prefills == (
        Prefill(2, slice(2, 4), 0, 0),
        Prefill(3, slice(4, 10), 2, 0),
        Prefill(4, slice(10, 13), 12, 6),
    )
    assert step.length.tolist() == [11, 1, 0, 2, 12]
    # Behind 3 sinks there are 8, none, none, none and 9 tokens: of 8 and of 9, 6 are sealed.
    assert step.sealed.tolist() == [6, 0, 0, 0, 6]
    assert (step.most, step.least) == (6, 0)
    # After it there are 9, none, none, 5 and 12: 6, 0, 0, 2 and 10 are sealed, groups counted from the third token on.
    assert step.groups.request.tolist() == [3, 4, 4]
    assert step.groups.first.tolist() == [3, 9, 11]
    # A ring has 3 places for the sinks and 3 for the newest others.
    assert step.exact.position.tolist() == [
        [0, 1, 2, 9, 10, 11],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 9, 10, 11],
    ]
    assert step.exact.exists.sum(1).tolist() == [5, 1, 0, 2, 6]
    assert step.kept.row.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert step.kept.request.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    assert step.kept.position.tolist() == [11, 1, 0, 1, 2, 5, 6, 7, 12, 13, 14]
    # Latents have the place of their position less 3, of 16 in a page; request i has the pages from 5 i on.
    assert step.slots.tolist() == [8, -1, -1, -1, -1, *(240 + place for place in range(5)), 329, 330, 331]


def test_latents_behind_sinks_go_on_in_the_next_page() -> None:
    step = plan([1, 4], [37, 21], window=0, group=1, sinks=4)
    assert step.slots.tolist() == [2 * 16, 5 * 16 + 13, 5 * 16 + 14, 5 * 16 + 15, 6 * 16]
    assert step.exact.position.tolist() == [[0, 1, 2, 3]] * 2  # and nothing else is kept
    assert step.kept.row.tolist() == []
    assert step.sealed.tolist() == [32, 13]


def test_tokens_without_a_slot_get_none() -> None:
    slots = torch.tensor([40, -1, -1, -1])
    numbers = np.array([0, 1, 2]), np.array([9, 9])
    step = plan_step(*numbers, torch.ones(2, 4, dtype=torch.int32), slots, 16, window=0, group=1, sinks=2)
    assert step.slots.tolist() == [16 + 6, -1]


def test_padding_is_left_out() -> None:
    """Requests without tokens come last, and their lengths mean nothing."""
    step = plan([1, 3, 0, 0], [7, 3, 900, 0], window=0, group=4)
    assert (step.tokens, step.decodes, len(step.prefills)) == (4, 1, 1)
    assert step.table.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert step.slots.tolist() == [100, 101, 102, 103]
    assert step.length.tolist() == [6, 0]
    assert step.most == step.least == 4  # 900 is not among them
    assert step.groups.request.tolist() == []


def test_nothing_to_do() -> None:
    step = plan([0, 0], [0, 0], window=2, group=2)
    assert (step.tokens, step.decodes, step.prefills, step.most, step.least) == (0, 0, (), 0, 0)
    assert len(step.kept.row) == len(step.groups.first) == len(step.length) == 0


def test_prefills_alone() -> None:
    step = plan([4, 2], [4, 20], window=0, group=1)
    assert (step.decodes, step.most, step.least) == (0, 0, 0)
    assert step.prefills == (Prefill(0, slice(0, 4), 0, 0), Prefill(1, slice(4, 6), 18, 18))


def test_a_last_piece_of_one_token_is_as_a_decode() -> None:
    """Wherever it stands: after longer pieces it is a short prefill."""
    assert plan([1, 1, 3], [1, 9, 3], 0, 4).decodes == 2
    step = plan([1, 3, 1], [5, 3, 9], 0, 4)
    assert (step.decodes, [prefill.request for prefill in step.prefills]) == (1, [1, 2])
    assert step.prefills[1] == Prefill(2, slice(4, 5), 8, 8)


def test_without_window_and_groups_nothing_is_kept_exactly() -> None:
    step = plan([1, 4], [6, 9], window=0, group=1)
    assert step.sealed.tolist() == step.length.tolist() == [5, 5]
    assert step.kept.row.tolist() == []
    assert step.groups.first.tolist() == [5, 5, 6, 7, 8]


class Walked(NamedTuple):
    """What a walk through all tokens of a step finds, in order."""

    kept: list[tuple[int, int, int]]
    groups: list[tuple[int, int]]
    sealed: list[int]
    slots: list[int]


def walk(new: list[int], before: list[int], window: int, group: int, sinks: int) -> Walked:
    """A token behind the sinks is sealed once its whole group is older than the newest `window`."""
    found, row = Walked([], [], [], []), 0
    for request, (size, old) in enumerate(zip(new, before)):
        length, sealed = old + size, 0
        for position in range(length):
            place = position - sinks
            last_of_group = sinks + (place // group + 1) * group
            sealed_before = place >= 0 and position < old and last_of_group <= old - window
            sealed += sealed_before
            if place >= 0 and not sealed_before and place % group == 0 and last_of_group <= length - window:
                found.groups.append((request, position))
            if position >= old:
                if place < 0 or position >= length - (window + group - 1):
                    found.kept.append((row, request, position))
                page = request * 5 + max(0, place) // 16
                found.slots.append(-1 if place < 0 else page * 16 + place % 16)
                row += 1
        found.sealed.append(sealed)
    return found


requests = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=6)


@given(requests, st.integers(0, 9), st.integers(1, 9), st.sampled_from([0, 1, 4, 20, 99]), st.integers(0, 3))
def test_it_is_a_walk_through_all_tokens(
    batch: list[tuple[int, int]], window: int, group: int, sinks: int, padding: int
) -> None:
    batch.sort(key=lambda request: request[0] > 1)
    new, before = ([request[i] for request in batch] for i in (0, 1))
    lengths = [size + old for size, old in batch] + [33] * padding
    step, found = plan(new + [0] * padding, lengths, window, group, sinks), walk(new, before, window, group, sinks)
    assert list(zip(*(part.tolist() for part in step.kept))) == found.kept
    assert list(zip(*(part.tolist() for part in step.groups))) == found.groups
    assert step.sealed.tolist() == found.sealed
    assert step.length.tolist() == before
    held = [row[there].tolist() for row, there in zip(step.exact.position, step.exact.exists)]
    assert held == [
        [p for p in range(old) if not sinks <= p < sinks + sealed] for sealed, old in zip(found.sealed, before)
    ]
    if sinks:
        assert step.slots.tolist() == found.slots
    assert step.decodes == new.count(1)
    decoding = found.sealed[: step.decodes]
    assert (step.most, step.least) == (max(decoding, default=0), min(decoding, default=0))
    assert [(p.request, p.rows.stop - p.rows.start, p.length, p.sealed) for p in step.prefills] == [
        (i, new[i], before[i], found.sealed[i]) for i in range(step.decodes, len(new))
    ]
    rows = [*range(step.decodes), *(row for p in step.prefills for row in range(p.rows.start, p.rows.stop))]
    assert rows == list(range(step.tokens)) == list(range(sum(new)))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([0, 1, 5]),
)
def test_every_group_is_sealed_once(pieces: list[int], window: int, group: int, sinks: int) -> None:
    """And its tokens are those that a ring holds, or come in that very step."""
    length, sealed, ring = 0, [], Ring(window, group, 1, 1, 0, 0, torch.float32, sinks)
    held = dict[int, int]()
    for size in pieces:
        step = plan([size], [length + size], window, group, sinks, blocks=9)
        for first in step.groups.first.tolist():
            positions = torch.arange(first, first + group)
            for position, place in zip(positions.tolist(), ring.places(positions).tolist()):
                assert position >= length or held[place] == position
            sealed.append(first)
        for place, position in zip(ring.places(step.kept.position).tolist(), step.kept.position.tolist()):
            held[place] = position
        length += size
    assert sealed == list(range(sinks, sinks + max(0, length - sinks - window) // group * group, group))
    assert [held[position] for position in range(min(sinks, length))] == list(range(min(sinks, length)))

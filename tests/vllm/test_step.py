"""What a step seals and keeps, by hand and beside a model that goes through all tokens one by one."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv.vllm.step import Prefill, Step, plan_step


def plan(new: list[int], lengths: list[int], window: int, group: int, blocks: int = 5) -> Step:
    """A step that brings `new` tokens, after which requests have `lengths`; the batch has 3 tokens of padding."""
    starts = np.array(list(accumulate(new, initial=0)), dtype=np.int64)
    table = torch.arange(len(new) * blocks, dtype=torch.int32).view(len(new), blocks)
    slots = torch.arange(100, 100 + sum(new) + 3)
    return plan_step(starts, np.array(lengths, dtype=np.int64), table, slots, window, group)


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
    assert step.recent.position.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert step.recent.exists.sum(1).tolist() == [5, 3, 0, 5]
    assert step.kept.row.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert step.kept.request.tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert step.kept.position.tolist() == [9, 3, 0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


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


def walk(new: list[int], before: list[int], window: int, group: int) -> Walked:
    """A token is sealed once its whole group is older than the newest `window`."""
    found, row = Walked([], [], []), 0
    for request, (size, old) in enumerate(zip(new, before)):
        length = old + size
        sealed = {p for p in range(old) if (p // group + 1) * group <= old - window}
        found.sealed.append(len(sealed))
        for position in range(length):
            last_of_group = (position // group + 1) * group
            if position not in sealed and position % group == 0 and last_of_group <= length - window:
                found.groups.append((request, position))
            if position >= old:
                if position >= length - (window + group - 1):
                    found.kept.append((row, request, position))
                row += 1
    return found


requests = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=6)


@given(requests, st.integers(0, 9), st.integers(1, 9), st.integers(0, 3))
def test_it_is_a_walk_through_all_tokens(batch: list[tuple[int, int]], window: int, group: int, padding: int) -> None:
    batch.sort(key=lambda request: request[0] > 1)
    new, before = ([request[i] for request in batch] for i in (0, 1))
    lengths = [size + old for size, old in batch] + [33] * padding
    step, found = plan(new + [0] * padding, lengths, window, group), walk(new, before, window, group)
    assert list(zip(*(part.tolist() for part in step.kept))) == found.kept
    assert list(zip(*(part.tolist() for part in step.groups))) == found.groups
    assert step.sealed.tolist() == found.sealed
    assert step.length.tolist() == before
    held = [row[there].tolist() for row, there in zip(step.recent.position, step.recent.exists)]
    assert held == [list(range(sealed, old)) for sealed, old in zip(found.sealed, before)]
    assert step.decodes == new.count(1)
    decoding = found.sealed[: step.decodes]
    assert (step.most, step.least) == (max(decoding, default=0), min(decoding, default=0))
    assert [(p.request, p.rows.stop - p.rows.start, p.length, p.sealed) for p in step.prefills] == [
        (i, new[i], before[i], found.sealed[i]) for i in range(step.decodes, len(new))
    ]
    rows = [*range(step.decodes), *(row for p in step.prefills for row in range(p.rows.start, p.rows.stop))]
    assert rows == list(range(step.tokens)) == list(range(sum(new)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 9), st.integers(1, 9))
def test_every_group_is_sealed_once(pieces: list[int], window: int, group: int) -> None:
    """And its tokens are those that a ring holds, or come in that very step."""
    length, sealed, ring = 0, [], dict[int, int]()
    for size in pieces:
        step = plan([size], [length + size], window, group)
        for first in step.groups.first.tolist():
            for position in range(first, first + group):
                assert position >= length or ring[position % (window + group - 1)] == position
            sealed.append(first)
        for position in step.kept.position.tolist():
            ring[position % (window + group - 1)] = position
        length += size
    assert sealed == list(range(0, max(0, length - window) // group * group, group))

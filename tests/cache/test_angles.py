"""Cos and sin in memory of fixed size: each at the place of its token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cskv.cache.angles import AngleTable
from cskv.cache.clock import Clock
from cskv.errors import CacheError

SINKS, ROTARY = 2, 6


def angles(rows: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Cos and sin whose entries are the number of the column, and 100 times that of the row (sin: negated)."""
    number = torch.arange(start, stop)[None, :, None] + 100.0 * torch.arange(rows)[:, None, None]
    return number.expand(-1, -1, ROTARY), -number.expand(-1, -1, ROTARY)


def filled(batch: int, rows: int, padding: tuple[int, ...] = (), prompt: int = 7) -> AngleTable:
    """A table after a prompt and three steps."""
    clock = Clock(2, 4, SINKS, 20)
    table = AngleTable(clock)
    clock.allocate(batch, torch.device("cpu"))
    clock.extend(prompt, lambda _seen: padding)
    given = angles(rows, 0, prompt)
    table.allocate(given[0], torch.zeros(1))
    table.extend(*given)
    for column in range(prompt, prompt + 3):
        clock.tick()
        table.append(*angles(rows, column, column + 1))
    return table


def test_rows_of_one_length_share_what_they_are_given_for_all() -> None:
    table = filled(3, 1)
    assert table.cos.shape == table.sin.shape == (1, 18, ROTARY)
    assert table.cos[0, :, 0].tolist() == [*range(2, 10)] + [0] * 10
    assert torch.equal(table.sin, -table.cos)
    with pytest.raises(CacheError, match="position embeddings of 3 rows"):
        table.append(*angles(3, 10, 11))
    table.reorder(torch.tensor([2, 2, 0]))
    assert table.cos[0, 0, 0] == 2


def test_padded_rows_begin_at_their_first_token() -> None:
    for given in (1, 2):
        table = filled(2, given, (0, 4))
        second = 100 * (given - 1)
        assert table.cos[0, :8, 5].tolist() == [*range(2, 10)]
        assert table.cos[1, :4, 5].tolist() == [number + second for number in range(6, 10)]


def test_rows_are_taken_in_the_same_memory() -> None:
    table = filled(2, 2)
    expected, address = table.cos[1].clone(), table.cos.data_ptr()
    table.reorder(torch.tensor([1, 1]))
    assert torch.equal(table.cos[0], expected)
    assert torch.equal(table.sin[0], -expected)
    assert table.cos.data_ptr() == address


def test_bytes() -> None:
    assert AngleTable(Clock(2, 4, SINKS, 20)).nbytes() == 0
    assert filled(2, 2).nbytes() == 2 * 2 * 18 * ROTARY * 4

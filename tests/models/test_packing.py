"""Texts that are packed in a row show by their positions."""

from __future__ import annotations

import pytest
import torch

from cskv.models.packing import is_packed


@pytest.mark.parametrize(
    ("positions", "packed"),
    [
        ([0, 1, 2, 3], False),
        ([7, 8, 9], False),  # a later piece of a text
        ([0, 1, 5, 6], False),  # of which tokens were left out
        ([0, 1, 2, 0, 1], True),
        ([2, 3, 2, 3, 4], True),
        ([0, 0], True),
    ],
)
def test_positions_that_start_again_are_of_several_texts(positions: list[int], packed: bool) -> None:
    assert is_packed(torch.tensor([positions])) == packed

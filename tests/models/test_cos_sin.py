"""Cos and sin of old positions."""

from __future__ import annotations

import pytest
import torch

from cskv.models.cos_sin import FixedCosSin
from tests.models.families import tiny_model


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("batch", [1, 2])
def test_pieces_are_the_whole(length: int, batch: int) -> None:
    embedding = tiny_model("llama").model.rotary_emb
    positions = torch.randint(0, 9000, (batch, length), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, dtype=torch.bfloat16)
    cos, sin = FixedCosSin(embedding).cos_sin((positions,), x)
    expected = embedding(x, positions)
    assert torch.equal(cos, expected[0])
    assert torch.equal(sin, expected[1])

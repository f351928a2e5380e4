"""Packed codes: hand-computed bytes, and every width comes back whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv.quantization.packing import pack, planes, row_bytes, unpack


@pytest.mark.parametrize(
    ("codes", "bits", "packed"),
    [
        ([1, 2, 3, 0], 2, [0b00111001]),
        ([1, 2, 3, 0, 3], 2, [0b11_11_01, 0b00_10]),  # two bytes: channels 0, 2, 4 and 1, 3
        ([5, 9], 4, [0x95]),
        ([5, 9, 1], 4, [0x15, 0x09]),
        ([200, 7], 8, [200, 7]),
        ([5, 2], 3, [0b1001, 0b01]),  # low two bits 01, 10, then high bits 1, 0
    ],
)
def test_bytes_by_hand(codes: list[int], bits: int, packed: list[int]) -> None:
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed


@given(st.integers(1, 8), st.integers(1, 41), st.integers(1, 3), st.randoms(use_true_random=False))
def test_unpacking_gives_the_codes_back(bits: int, channels: int, rows: int, random) -> None:
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(channels)] for _ in range(rows)], dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, row_bytes(channels, bits))
    out = torch.full_like(codes, 255)
    unpack(packed, bits, out)
    assert torch.equal(out, codes)


@given(st.integers(1, 8), st.integers(1, 300))
def test_no_byte_is_wasted_but_the_last_of_a_plane(bits: int, channels: int) -> None:
    assert 0 <= 8 * row_bytes(channels, bits) - bits * channels < 8 * len(planes(bits))

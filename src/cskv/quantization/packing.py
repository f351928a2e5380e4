"""Codes of 1 to 8 bits, packed into whole bytes along the channels of a token.

A width is a sum of powers of two (3 = 2 + 1), and each summand is a plane of its own: the low bits of every code first.
In a plane of width w, `n = 8 / w` codes share a byte. Byte j of its B bytes holds the channels j, j + B, j + 2B, ...,
from the low bits up, so that unpacking is a shift and a mask of contiguous bytes.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import UInt8
from torch import Tensor

WIDTHS = range(1, 9)


@cache
def planes(bits: int) -> tuple[int, ...]:
    """Return the powers of two that sum to a width, largest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def row_bytes(channels: int, bits: int) -> int:
    """Count the bytes of one token's codes: every plane is padded to a whole byte."""
    return sum(-(-channels * width // 8) for width in planes(bits))


def pack(codes: UInt8[Tensor, "*rows channels"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Pack codes below `2**bits`.

    Args:
        codes: one code per element.
        bits: 1 to 8.

    Returns:
        `row_bytes(channels, bits)` bytes per row.
    """
    parts, shift = [], 0
    for width in planes(bits):
        plane, per_byte = (codes >> shift) & ((1 << width) - 1), 8 // width
        size = -(-codes.shape[-1] // per_byte)
        plane = torch.nn.functional.pad(plane, (0, size * per_byte - codes.shape[-1])).unflatten(-1, (per_byte, size))
        packed = plane[..., 0, :].clone()
        for index in range(1, per_byte):
            packed |= plane[..., index, :] << (index * width)
        parts.append(packed)
        shift += width
    return torch.cat(parts, dim=-1)


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, out: UInt8[Tensor, "*rows channels"]) -> None:
    """Unpack codes that `pack` packed into `out`, which has as many channels as they had."""
    channels, first, shift = out.shape[-1], 0, 0
    for width in planes(bits):
        size = -(-channels * width // 8)  # bytes of the plane
        for index in range(8 // width):
            own = out[..., index * size : (index + 1) * size]
            source = packed[..., first : first + own.shape[-1]]
            if not own.shape[-1]:
                continue
            part = own if shift == 0 else torch.empty_like(own)  # the first plane overwrites what was there
            if torch.compiler.is_compiling():  # it cannot trace results written into a part of a tensor
                part.copy_(source >> index * width)
            else:
                torch.bitwise_right_shift(source, index * width, out=part)
            if (index + 1) * width < 8:
                part &= (1 << width) - 1
            if shift:
                own |= part << shift
        first, shift = first + size, shift + width

"""Tiles of latents in Triton: plain, packed or in pages, as the kernels read them.

Packed codes take a byte per plane and channel, found by a table; see `cskv.quantization.tables`. Latents of a server's
requests lie in pages that a table names: where tiles do not cross pages a tile has one address, as if there were none;
else every token has one.

Triton reads the source of a kernel, so type checkers that wrap functions have to leave these alone.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def rounded(x, ELEMENT: tl.constexpr, EMULATED: tl.constexpr):
    """fp32 numbers in the dtype of products. The interpreter has no bf16 arithmetic: there they are rounded fp32."""
    if EMULATED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(ELEMENT)


@triton.jit
@no_type_check
def piece(
    data, scales, minima, table, slot, first_slot, remaining, token_ok, block_row, group, groups, rank, readable,
    plane_bytes, data_stride, parameter_stride, page, page_stride, parameter_page_stride, start,
    INDEX: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr, BY_PLANES: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCKS_OF: tl.constexpr, CHANNELS_OF: tl.constexpr, PAGE: tl.constexpr,
    ELEMENT: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """A piece of a tile's latents, (tokens, SIZE), with zeros where there are none.

    A group's channels are cut into pieces, from `start` on. PLANES is 0 for plain latents, else codes are found by the
    table, unless all have BITS bits, a divisor of 8: byte b of plane_bytes then holds the channels b, plane_bytes + b
    and so on. BY_PLANES, which is for one group, makes each of those planes a piece: its bytes lie one after the other,
    and are loaded once for all pieces. Where there are more groups, each lies within one plane.

    BLOCKS_OF is how many tokens share a row of parameters where tiles consist of such blocks, `remaining` of the tile's
    tokens being there; CHANNELS_OF is how many channels share a column where pieces begin with one; else 0.

    In pages, slot and block_row count from the beginning of the page, which is one of all or of each, (tokens, 1).
    """
    if PAGE > 0:
        data += page * page_stride
        if PLANES > 0:
            scales += page * parameter_page_stride
            minima += page * parameter_page_stride
    within = tl.arange(0, SIZE)
    row = data + slot[:, None] * data_stride
    if PLANES == 0:
        channel = start + within
        ok = token_ok[:, None] & (channel < readable)[None, :]
        latents = tl.load(row + group * readable + channel[None, :], mask=ok, other=0.0)
        if EMULATED:
            latents = latents.to(tl.float32)
        return latents
    elif BITS > 0:
        if BY_PLANES:
            channel = INDEX * plane_bytes + within
            channel_ok = (within < plane_bytes) & (channel < rank)
            byte, shift, byte_ok = within, BITS * INDEX, within < readable
        else:
            first = group * rank
            channel_ok = start + within < rank
            channel = first + start + within
            byte, shift, byte_ok = first % plane_bytes + start + within, first // plane_bytes * BITS, channel_ok
        packed = tl.load(row + byte[None, :], mask=token_ok[:, None] & byte_ok[None, :], other=0)
        code = ((packed.to(tl.int32) >> shift) & ((1 << BITS) - 1)).to(tl.float32)
        if BLOCKS_OF > 0:  # a row of parameters for so many tokens, read once
            block = tl.arange(0, slot.shape[0] // BLOCKS_OF)
            at = (first_slot // BLOCKS_OF + block)[:, None] * parameter_stride + (channel // BLOCK_CHANNELS)[None, :]
            ok = (block * BLOCKS_OF < remaining)[:, None] & channel_ok[None, :]
            code = tl.reshape(code, [slot.shape[0] // BLOCKS_OF, BLOCKS_OF, SIZE])
            code *= tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)[:, None, :]
            code += tl.load(minima + at, mask=ok, other=0.0).to(tl.float32)[:, None, :]
            latents = tl.reshape(code, [slot.shape[0], SIZE])
        elif CHANNELS_OF > 0 and SIZE % CHANNELS_OF == 0:  # a column for so many channels
            block = tl.arange(0, SIZE // CHANNELS_OF)
            first = INDEX * plane_bytes // CHANNELS_OF
            at = block_row[:, None] * parameter_stride + (first + block)[None, :]
            ok = (
                token_ok[:, None] & (block * CHANNELS_OF < tl.minimum(plane_bytes, rank - INDEX * plane_bytes))[None, :]
            )
            code = tl.reshape(code, [slot.shape[0], SIZE // CHANNELS_OF, CHANNELS_OF])
            code *= tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)[:, :, None]
            code += tl.load(minima + at, mask=ok, other=0.0).to(tl.float32)[:, :, None]
            latents = tl.where(channel_ok[None, :], tl.reshape(code, [slot.shape[0], SIZE]), 0.0)
        else:
            at = block_row[:, None] * parameter_stride + (channel // BLOCK_CHANNELS)[None, :]
            ok = token_ok[:, None] & channel_ok[None, :]
            latents = code * tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)
            latents += tl.load(minima + at, mask=ok, other=0.0).to(tl.float32)
        return rounded(latents, ELEMENT, EMULATED)
    else:
        channel = start + within
        channel_ok = channel < rank
        channel += group * rank
        ok = token_ok[:, None] & channel_ok[None, :]
        code = tl.zeros(ok.shape, tl.int32)
        columns = groups * rank
        for plane in tl.static_range(PLANES):
            entry = table + (1 + 4 * plane) * columns + channel
            byte = tl.load(entry, mask=channel_ok, other=0)
            right = tl.load(entry + columns, mask=channel_ok, other=0)
            bits = tl.load(entry + 2 * columns, mask=channel_ok, other=0)
            left = tl.load(entry + 3 * columns, mask=channel_ok, other=0)
            there = token_ok[:, None] & (bits > 0)[None, :]
            packed = tl.load(row + byte[None, :], mask=there, other=0).to(tl.int32)
            code |= ((packed >> right[None, :]) & bits[None, :]) << left[None, :]
        block = tl.load(table + channel, mask=channel_ok, other=0)
        at = block_row[:, None] * parameter_stride + block[None, :]
        scale = tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)
        minimum = tl.load(minima + at, mask=ok, other=0.0).to(tl.float32)
        return rounded(code.to(tl.float32) * scale + minimum, ELEMENT, EMULATED)


@triton.jit
@no_type_check
def piece_channels(rank, plane_bytes, start, INDEX: tl.constexpr, SIZE: tl.constexpr, BY_PLANES: tl.constexpr):
    """The channels of a piece within its group, and which of them there are."""
    within = tl.arange(0, SIZE)
    if BY_PLANES:
        channel = INDEX * plane_bytes + within
        return channel, (within < plane_bytes) & (channel < rank)
    else:
        channel = start + within
        return channel, channel < rank


@triton.jit
@no_type_check
def block_rows_of(token, token_ok, rows, BLOCK_TOKENS: tl.constexpr, HAS_ROWS: tl.constexpr):
    """The row of scales and minima that holds for each token."""
    if HAS_ROWS:
        return tl.load(rows + token, mask=token_ok, other=0).to(tl.int32)
    else:
        return token // BLOCK_TOKENS


@triton.jit
@no_type_check
def loaded(pointer, ok, EMULATED: tl.constexpr):
    """Numbers as operands of products, with zeros where there are none."""
    numbers = tl.load(pointer, mask=ok, other=0.0)
    if EMULATED:
        numbers = numbers.to(tl.float32)
    return numbers


@triton.jit
@no_type_check
def places(start, token, token_ok, page_table, TILE: tl.constexpr, PAGE: tl.constexpr):
    """Where a tile's tokens lie: slots, the first one, and the page that they count from, which may be one of each."""
    if PAGE == 0:
        return token, start, 0
    elif PAGE % TILE == 0:
        return start % PAGE + tl.arange(0, TILE), start % PAGE, tl.load(page_table + start // PAGE).to(tl.int64)
    else:
        page = tl.load(page_table + token // PAGE, mask=token_ok, other=0).to(tl.int64)
        return token % PAGE, 0, page[:, None]


INTERPRETED = not isinstance(places, triton.runtime.JITFunction)  # by TRITON_INTERPRET=1, as triton was first imported

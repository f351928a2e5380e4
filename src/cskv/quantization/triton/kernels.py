"""Triton kernels that put latents on a grid, bit for bit as `cskv.quantization.grid.quantise` does on the CPU.

`parameters` gives every program some blocks and goes through their values one after another: with blocks along the
tokens, which have one channel, neighbouring lanes read neighbouring channels. `codes` gives every program some tokens
and bytes and computes the codes that share a byte, up to eight; where a width has several planes its codes are computed
for each. Both are for a few dozen tokens at a time, as they leave the window, and for prefills; not measured yet.

Division is IEEE's, not Triton's faster one. bf16 in one direction is integer arithmetic on the bits of fp32. Blocks
with NaN are not told apart: their parameters come from the other values, where torch gives NaN.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: fp32 numbers near it are whole, so adding it rounds, half to even


@triton.jit
@no_type_check
def _directed(x, UP: tl.constexpr):
    """Round fp32 to bf16, up or down, as bits in the upper half of an int32.

    Cutting off the lower half rounds towards zero; adding to it first rounds away from zero.
    """
    bits = x.to(tl.int32, bitcast=True)
    away = bits >= 0 if UP else bits < 0
    return tl.where(away, bits + 0xFFFF, bits) & -65536


@triton.jit
@no_type_check
def parameters(
    latents, scales, minima, table, tokens, rows, columns, batch_stride, token_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scale and minimum of BLOCKS blocks, as the bits of bf16. The grid is (rows x columns of blocks, batch)."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    batch = tl.program_id(1).to(tl.int64)
    ok = block < rows * columns
    column = block % columns
    first = (block // columns) * BLOCK_TOKENS
    channel = tl.load(table + column, mask=ok, other=0)
    channels = tl.load(table + columns + column, mask=ok, other=0)
    levels = tl.load(table + 2 * columns + column, mask=ok, other=1)
    at = latents + batch * batch_stride + first.to(tl.int64) * token_stride + channel
    least = tl.full([BLOCKS], float("inf"), tl.float32)
    most = tl.full([BLOCKS], float("-inf"), tl.float32)
    for token in range(BLOCK_TOKENS):
        for other in range(BLOCK_CHANNELS):
            there = ok & (first + token < tokens) & (other < channels)
            value = tl.load(at + token * token_stride + other, mask=there, other=0.0).to(tl.float32)
            least = tl.where(there, tl.minimum(least, value), least)
            most = tl.where(there, tl.maximum(most, value), most)
    minimum = _directed(least, False)
    spread = most - minimum.to(tl.float32, bitcast=True)
    scale = _directed(tl.div_rn(spread, levels.to(tl.float32)), True)
    out = batch * rows * columns + block
    tl.store(minima + out, (minimum >> 16).to(tl.int16), mask=ok)
    tl.store(scales + out, (scale >> 16).to(tl.int16), mask=ok)


@triton.jit
@no_type_check
def codes(
    latents, scales, minima, payload, table, channel_block,
    tokens, row_bytes, rows, columns, batch_stride, token_stride,
    BLOCK_TOKENS: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """BYTES bytes of TOKENS tokens. The grid is (blocks of tokens, blocks of bytes, batch).

    SLOTS is the most codes that share a byte: 8 where any plane has one bit.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    batch = tl.program_id(2).to(tl.int64)
    token_ok, byte_ok = token < tokens, byte < row_bytes
    first = tl.load(table + byte, mask=byte_ok, other=0)
    stride = tl.load(table + row_bytes + byte, mask=byte_ok, other=0)
    end = tl.load(table + 2 * row_bytes + byte, mask=byte_ok, other=0)
    width = tl.load(table + 3 * row_bytes + byte, mask=byte_ok, other=8)
    below = tl.load(table + 4 * row_bytes + byte, mask=byte_ok, other=0)
    levels = tl.load(table + 5 * row_bytes + byte, mask=byte_ok, other=1).to(tl.float32)
    latents += batch * batch_stride
    parameter = batch * rows * columns + (token // BLOCK_TOKENS)[:, None] * columns
    packed = tl.zeros([TOKENS, BYTES], tl.int32)
    for slot in tl.static_range(SLOTS):
        channel = first + slot * stride
        there = byte_ok & (channel < end) & (slot * width < 8)
        ok = token_ok[:, None] & there[None, :]
        block = tl.load(channel_block + channel, mask=there, other=0)
        value = tl.load(latents + token.to(tl.int64)[:, None] * token_stride + channel[None, :], mask=ok, other=0.0).to(
            tl.float32
        )
        scale = _wide(tl.load(scales + parameter + block[None, :], mask=ok, other=0))
        minimum = _wide(tl.load(minima + parameter + block[None, :], mask=ok, other=0))
        code = tl.div_rn(value - minimum, tl.where(scale > 0, scale, 1.0))
        code = tl.minimum(tl.maximum(code, 0.0), levels[None, :])
        code = ((code + ROUNDER) - ROUNDER).to(tl.int32)
        plane = (code >> below[None, :]) & ((1 << width) - 1)[None, :]
        shift = tl.where(there, slot * width, 0)
        packed |= tl.where(ok, plane << shift[None, :], 0)
    out = (batch * tokens + token)[:, None] * row_bytes + byte[None, :]
    tl.store(payload + out, packed.to(tl.uint8), mask=token_ok[:, None] & byte_ok[None, :])


@triton.jit
@no_type_check
def _wide(bits):
    """Convert the bits of bf16 to fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


INTERPRETED = not isinstance(codes, triton.runtime.JITFunction)  # by TRITON_INTERPRET=1, as triton was first imported

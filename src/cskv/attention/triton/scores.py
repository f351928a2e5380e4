"""Triton kernel of the products of queries and keys that are rebuilt from latents, normalised and rotated.

Rebuilding is rank x kv_dim multiply-adds a token, so everything is arranged for the tensor cores: a program keeps the
up-projection of some kv heads, and their queries, for as long as it goes through its tokens, and a tile of latents is
rebuilt for all of these heads by one product with the tokens as its rows:

    keys      (tokens, heads x head_dim) = latents (tokens, rank) U^T
    8 bits    latents are rounded to int8 by token, as `cskv.attention.int8_keys` says, where U is in int8
    RoPE      the channels that a rotation mixes are neighbours among the columns, in the same thread's registers
    products  (tokens, rows) = keys q^T, with the queries of every head in its own columns of a block-diagonal q

Products are written as (batch, tokens, lines), the lines being the sequence's query rows, for `partials` to read.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from cskv.attention.triton.tiles import block_rows_of, loaded, piece, piece_channels, places, rounded

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: fp32 numbers near it are whole, so adding it rounds, half to even


@triton.jit
@no_type_check
def _up_piece(
    up, up_row, column, column_ok, rank, plane_bytes, start,
    INDEX: tl.constexpr, SIZE: tl.constexpr, BY_PLANES: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The rows of U for the program's columns, (latents of a piece, columns)."""
    latent, latent_ok = piece_channels(rank, plane_bytes, start, INDEX, SIZE, BY_PLANES)
    ok = latent_ok[:, None] & column_ok[None, :]
    return loaded(up + column[None, :] * up_row + latent[:, None], ok, EMULATED)


@triton.jit
@no_type_check
def _balance(balance, rank, plane_bytes, start, INDEX: tl.constexpr, SIZE: tl.constexpr, BY_PLANES: tl.constexpr):
    """What the latents of a piece are multiplied by before they are rounded."""
    latent, latent_ok = piece_channels(rank, plane_bytes, start, INDEX, SIZE, BY_PLANES)
    return tl.load(balance + latent, mask=latent_ok, other=0.0)


@triton.jit
@no_type_check
def _in_int8(latents, steps):
    """Latents as whole numbers of their token's steps, rounded half to even."""
    inverse = 1.0 / tl.where(steps > 0, steps, 1.0)
    whole = latents * inverse[:, None]
    return ((whole + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit(do_not_specialize=["tokens", "begin", "lines"])
@no_type_check
def scores(
    query, up, up_steps, balance, key_bias, key_norm, cos, sin, page_table, lengths, k_data, k_scales, k_minima, k_rows,
    k_table, products, tokens, begin, lines, groups, group_heads, head_rows, row_blocks, key_rank, k_units, k_plane,
    norm_eps, query_batch, query_row, up_row, cos_batch, cos_token, sin_batch, sin_token, products_batch, page_row,
    k_batch, k_token, k_parameter_batch, k_parameter_row,
    K_UNIT: tl.constexpr, K_PLANES: tl.constexpr, K_BITS: tl.constexpr, K_BY_PLANES: tl.constexpr,
    K_BLOCK_TOKENS: tl.constexpr, K_BLOCK_CHANNELS: tl.constexpr, K_BLOCKS_OF: tl.constexpr,
    K_CHANNELS_OF: tl.constexpr, K_HAS_ROWS: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, HALF: tl.constexpr, IS_SYMMETRIC: tl.constexpr,
    IN_INT8: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr, K_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr, ELEMENT: tl.constexpr, EMULATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the rows of HEADS kv heads with the tokens of a range.

    The grid is (blocks of kv heads x blocks of their rows, ranges of tokens, batch): programs that read the same
    latents run together. HEADS divides the heads of a group, and is 1 where a head has more rows than a program.

    query is (batch, lines, HEAD_DIM), up (kv_dim, rank of a group), cos and sin (batch, tokens, ROTARY_DIM). Tokens
    from `begin` on are read; products begins with them. Latents come in the pieces K0 to K3, 0 for none, or, where
    K_BLOCKS is more than 1, in as many blocks of K0, with which U is read again for every tile. IS_SYMMETRIC says that
    both halves of cos and of sin are equal, IN_INT8 that up is, with up_steps (kv_dim)
    for its rows, and that latents are to be multiplied by balance (latents of all groups) and rounded.

    PAGE is the tokens of a page, 0 where each sequence's latents are one after the other. With pages, page_table is
    (batch, pages) and lengths (batch); k_batch and that of the parameters are strides of pages then, and `tokens` a
    bound on the lengths.
    """
    head_block = tl.program_id(0) // row_blocks
    row_block = tl.program_id(0) % row_blocks
    batch = tl.program_id(2).to(tl.int64)
    first_head = head_block * HEADS
    group = first_head // group_heads
    k_readable = k_units * K_UNIT

    COLUMNS: tl.constexpr = HEADS * 2 * HALF
    UP_EMULATED: tl.constexpr = EMULATED and not IN_INT8
    column = tl.arange(0, COLUMNS)
    half = column % (2 * HALF) // 2
    is_hi = column % 2 == 1
    rotated = half < ROTARY_DIM // 2
    lo = tl.where(rotated, half, half + ROTARY_DIM // 2)
    hi = tl.where(rotated, half + ROTARY_DIM // 2, half + HEAD_DIM // 2)
    channel = tl.where(is_hi, hi, lo)
    column_ok = half < HEAD_DIM // 2
    of_column = column // (2 * HALF)
    up_column = (first_head + of_column) * HEAD_DIM + channel

    row = row_block * ROWS + tl.arange(0, ROWS)
    row_ok = row < HEADS * head_rows
    line = first_head * head_rows + row
    of_row = row // head_rows
    query += batch * query_batch + line[None, :] * query_row + channel[:, None]
    query_ok = (row_ok & (of_row < HEADS))[None, :] & column_ok[:, None] & (of_row[None, :] == of_column[:, None])
    queries = loaded(query, query_ok, EMULATED)
    if K_BLOCKS == 1:
        up0 = _up_piece(up, up_row, up_column, column_ok, key_rank, k_plane, 0, 0, K0, K_BY_PLANES, UP_EMULATED)
        if K1 > 0:
            up1 = _up_piece(up, up_row, up_column, column_ok, key_rank, k_plane, K0, 1, K1, K_BY_PLANES, UP_EMULATED)
        if K2 > 0:
            up2 = _up_piece(
                up, up_row, up_column, column_ok, key_rank, k_plane, K0 + K1, 2, K2, K_BY_PLANES, UP_EMULATED
            )
        if K3 > 0:
            up3 = _up_piece(
                up, up_row, up_column, column_ok, key_rank, k_plane, K0 + K1 + K2, 3, K3, K_BY_PLANES, UP_EMULATED
            )
    if IN_INT8:
        steps = tl.load(up_steps + up_column, mask=column_ok, other=0.0)
        balance += group * key_rank
        balance0 = _balance(balance, key_rank, k_plane, 0, 0, K0, K_BY_PLANES)
        if K1 > 0:
            balance1 = _balance(balance, key_rank, k_plane, K0, 1, K1, K_BY_PLANES)
        if K2 > 0:
            balance2 = _balance(balance, key_rank, k_plane, K0 + K1, 2, K2, K_BY_PLANES)
        if K3 > 0:
            balance3 = _balance(balance, key_rank, k_plane, K0 + K1 + K2, 3, K3, K_BY_PLANES)
    if HAS_BIAS:
        bias = tl.load(key_bias + up_column, mask=column_ok, other=0.0).to(tl.float32)
    if HAS_NORM:
        norm = tl.load(key_norm + channel, mask=column_ok, other=0.0).to(tl.float32)

    if PAGE > 0:
        page_table += batch * page_row
        tokens = tl.minimum(tl.load(lengths + batch).to(tl.int32), tokens)
    else:
        k_data += batch * k_batch
        if K_PLANES > 0:
            k_scales += batch * k_parameter_batch
            k_minima += batch * k_parameter_batch
    cos += batch * cos_batch
    sin += batch * sin_batch
    products += batch * products_batch
    pair = tl.arange(0, HALF)
    turns = pair < ROTARY_DIM // 2
    split_tokens = tl.cdiv(tl.cdiv(tl.maximum(tokens - begin, 0), TILE), tl.num_programs(1)) * TILE
    first = begin + tl.program_id(1) * split_tokens
    last = tl.minimum(first + split_tokens, tokens)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        token_ok = token < last
        slot, first_slot, page = places(start, token, token_ok, page_table, TILE, PAGE)
        k_row = block_rows_of(slot, token_ok, k_rows, K_BLOCK_TOKENS, K_HAS_ROWS)
        if K_BLOCKS == 1:
            latents0 = piece(
                k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group, groups,
                key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch, k_parameter_batch, 0, 0, K0,
                K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS, K_BLOCKS_OF, K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
            )  # fmt: skip
            if K1 > 0:
                latents1 = piece(
                    k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                    groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                    k_parameter_batch, K0, 1, K1, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS, K_BLOCKS_OF,
                    K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                )  # fmt: skip
            if K2 > 0:
                latents2 = piece(
                    k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                    groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                    k_parameter_batch, K0 + K1, 2, K2, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS, K_BLOCKS_OF,
                    K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                )  # fmt: skip
            if K3 > 0:
                latents3 = piece(
                    k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                    groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                    k_parameter_batch, K0 + K1 + K2, 3, K3, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS,
                    K_BLOCKS_OF, K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                )  # fmt: skip
            if IN_INT8:
                balanced0 = latents0.to(tl.float32) * balance0[None, :]
                largest = tl.max(tl.abs(balanced0), 1)
                if K1 > 0:
                    balanced1 = latents1.to(tl.float32) * balance1[None, :]
                    largest = tl.maximum(largest, tl.max(tl.abs(balanced1), 1))
                if K2 > 0:
                    balanced2 = latents2.to(tl.float32) * balance2[None, :]
                    largest = tl.maximum(largest, tl.max(tl.abs(balanced2), 1))
                if K3 > 0:
                    balanced3 = latents3.to(tl.float32) * balance3[None, :]
                    largest = tl.maximum(largest, tl.max(tl.abs(balanced3), 1))
                token_steps = largest / 127
                sums = tl.dot(_in_int8(balanced0, token_steps), up0, out_dtype=tl.int32)
                if K1 > 0:
                    sums = tl.dot(_in_int8(balanced1, token_steps), up1, sums, out_dtype=tl.int32)
                if K2 > 0:
                    sums = tl.dot(_in_int8(balanced2, token_steps), up2, sums, out_dtype=tl.int32)
                if K3 > 0:
                    sums = tl.dot(_in_int8(balanced3, token_steps), up3, sums, out_dtype=tl.int32)
                keys = sums.to(tl.float32) * token_steps[:, None] * steps[None, :]
            else:
                keys = tl.dot(latents0, up0, input_precision=PRECISION)
                if K1 > 0:
                    keys = tl.dot(latents1, up1, keys, input_precision=PRECISION)
                if K2 > 0:
                    keys = tl.dot(latents2, up2, keys, input_precision=PRECISION)
                if K3 > 0:
                    keys = tl.dot(latents3, up3, keys, input_precision=PRECISION)
        else:
            keys = tl.zeros([TILE, COLUMNS], tl.float32)
            for block in range(K_BLOCKS):  # not unrolled: all of its tiles would be in shared memory at once
                latents = piece(
                    k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                    groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                    k_parameter_batch, block * K0, 0, K0, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS,
                    K_BLOCKS_OF, K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                )  # fmt: skip
                of_block = _up_piece(
                    up, up_row, up_column, column_ok, key_rank, k_plane, block * K0, 0, K0, K_BY_PLANES, UP_EMULATED
                )
                keys = tl.dot(latents, of_block, keys, input_precision=PRECISION)
        if HAS_BIAS:
            keys += bias[None, :]
        if HAS_NORM:
            squares = tl.sum(tl.reshape(keys * keys, [TILE, HEADS, 2 * HALF]), 2)
            inverse = tl.rsqrt(squares / HEAD_DIM + norm_eps)
            keys *= tl.reshape(tl.broadcast_to(inverse[:, :, None], [TILE, HEADS, 2 * HALF]), [TILE, COLUMNS])
            keys *= norm[None, :]
        low, high = tl.split(tl.reshape(keys, [TILE, HEADS * HALF, 2]))
        at, turned = token[:, None], token_ok[:, None] & turns[None, :]
        cos_lo = tl.load(cos + at * cos_token + pair[None, :], mask=turned, other=1.0)
        sin_lo = tl.load(sin + at * sin_token + pair[None, :], mask=turned, other=0.0)
        if IS_SYMMETRIC:
            cos_hi, sin_hi = cos_lo, sin_lo
        else:
            cos_hi = tl.load(cos + at * cos_token + pair[None, :] + ROTARY_DIM // 2, mask=turned, other=1.0)
            sin_hi = tl.load(sin + at * sin_token + pair[None, :] + ROTARY_DIM // 2, mask=turned, other=0.0)
        turned_lo = low * _by_head(cos_lo, HEADS) - high * _by_head(sin_lo, HEADS)
        turned_hi = high * _by_head(cos_hi, HEADS) + low * _by_head(sin_hi, HEADS)
        keys = tl.reshape(tl.join(turned_lo, turned_hi), [TILE, COLUMNS])
        found = tl.dot(rounded(keys, ELEMENT, EMULATED), queries, input_precision=PRECISION)
        out = products + (token - begin).to(tl.int64)[:, None] * lines + line[None, :]
        tl.store(out, found, mask=token_ok[:, None] & row_ok[None, :])


@triton.jit
@no_type_check
def _by_head(part, HEADS: tl.constexpr):
    """Cos or sin of a tile, (tokens, pairs), for every head: (tokens, HEADS x pairs), in fp32."""
    part = part.to(tl.float32)
    if HEADS == 1:
        return part
    else:
        wide = tl.broadcast_to(part[:, None, :], [part.shape[0], HEADS, part.shape[1]])
        return tl.reshape(wide, [part.shape[0], HEADS * part.shape[1]])

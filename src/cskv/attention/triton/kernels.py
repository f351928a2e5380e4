"""Triton kernels of attention over latents: flash-decoding, split along the tokens.

`partials` gives every program some query rows and a range of tokens. It goes through the tokens in tiles: logits of the
tile, an online softmax in fp32, weights times value latents. `join` adds up the ranges. The layout:

    rows    query heads times new tokens, heads first. All heads of a head group share latents, as in multi-query
            attention, so a tile is loaded and unpacked once for up to 64 rows.
    keys    absorbed: scores = q~ c, over the rank in blocks. Rotated: the keys of one kv head at a time are rebuilt,
            U_h c, rotated and multiplied by the query; the rows of other heads are masked out of that product, which
            costs little beside rebuilding and lets one program serve many heads from one tile of latents.
    RoPE    the two halves that a rotation mixes are products of their own, (U_lo c, U_hi c), so no tile is shuffled.
            Channels that are not rotated are split into halves as well, with cos 1 and sin 0.
    values  sums += p c_v. Ranks too wide for one accumulator are blocks of the grid, each of which computes the scores
            again.
    codes   a byte per plane and channel, found by a table; see `cskv.quantization.tables`.
    pages   latents of a server's requests lie in pages that a table names. The ranges are then of each
            request's own tokens, whose number is read here: the host knows only a bound, which may be far above it.
            Where tiles do not cross pages a tile has one address, as if there were none; else every token has one.

Rows of latents should start at multiples of 16 bytes, that is, ranks be multiples of 8 in 16 bits: others are loaded
element by element and cannot be copied asynchronously.

Triton reads the source of a kernel, so type checkers that wrap functions have to leave these alone.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _rounded(x, ELEMENT: tl.constexpr, EMULATED: tl.constexpr):
    """fp32 numbers in the dtype of products. The interpreter has no bf16 arithmetic: there they are rounded fp32."""
    if EMULATED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(ELEMENT)


@triton.jit
@no_type_check
def _latents(
    data, scales, minima, table, token, token_ok, block_row, channel, channel_ok, data_stride, parameter_stride, rank,
    page, page_stride, parameter_page_stride,
    PAGE: tl.constexpr, PLANES: tl.constexpr, ELEMENT: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """A tile of latents, (tokens, channels), with zeros where there are none. PLANES is 0 for plain latents.

    In pages, token and block_row count from the beginning of the page, which is one of all or of each, (tokens, 1).
    """
    if PAGE > 0:
        data += page * page_stride
        if PLANES > 0:
            scales += page * parameter_page_stride
            minima += page * parameter_page_stride
    ok = token_ok[:, None] & channel_ok[None, :]
    if PLANES == 0:
        latents = tl.load(data + token[:, None] * data_stride + channel[None, :], mask=ok, other=0.0)
        if EMULATED:
            latents = latents.to(tl.float32)
        return latents
    else:
        code = tl.zeros(ok.shape, tl.int32)
        for plane in tl.static_range(PLANES):
            entry = table + (1 + 4 * plane) * rank + channel
            byte = tl.load(entry, mask=channel_ok, other=0)
            right = tl.load(entry + rank, mask=channel_ok, other=0)
            bits = tl.load(entry + 2 * rank, mask=channel_ok, other=0)
            left = tl.load(entry + 3 * rank, mask=channel_ok, other=0)
            there = token_ok[:, None] & (bits > 0)[None, :]
            packed = tl.load(data + token[:, None] * data_stride + byte[None, :], mask=there, other=0).to(tl.int32)
            code |= ((packed >> right[None, :]) & bits[None, :]) << left[None, :]
        block = tl.load(table + channel, mask=channel_ok, other=0)
        at = block_row[:, None] * parameter_stride + block[None, :]
        scale = tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)
        minimum = tl.load(minima + at, mask=ok, other=0.0).to(tl.float32)
        return _rounded(code.to(tl.float32) * scale + minimum, ELEMENT, EMULATED)


@triton.jit
@no_type_check
def _block_rows(token, token_ok, rows, BLOCK_TOKENS: tl.constexpr, HAS_ROWS: tl.constexpr):
    """The row of scales and minima that holds for each token."""
    if HAS_ROWS:
        return tl.load(rows + token, mask=token_ok, other=0).to(tl.int32)
    else:
        return token // BLOCK_TOKENS


@triton.jit
@no_type_check
def _loaded(pointer, ok, EMULATED: tl.constexpr):
    """Numbers as operands of products, with zeros where there are none."""
    numbers = tl.load(pointer, mask=ok, other=0.0)
    if EMULATED:
        numbers = numbers.to(tl.float32)
    return numbers


@triton.jit
@no_type_check
def _absorbed_scores(
    query, absorbed, data, scales, minima, table, slot, token_ok, block_row, page, row_ok, group, groups,
    rank, page_stride, data_stride, parameter_page_stride, parameter_stride,
    PLANES: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, KEY_BLOCKS: tl.constexpr, ELEMENT: tl.constexpr, EMULATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of absorbed queries, which are loaded already where they are one block, and a tile of latents."""
    scores = tl.zeros([ROWS, TILE], tl.float32)
    for block in tl.static_range(KEY_BLOCKS):
        channel = block * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
        channel_ok = channel < rank
        latents = _latents(
            data, scales, minima, table, slot, token_ok, block_row, group * rank + channel, channel_ok,
            data_stride, parameter_stride, groups * rank, page, page_stride, parameter_page_stride,
            PAGE, PLANES, ELEMENT, EMULATED,
        )  # fmt: skip
        if KEY_BLOCKS > 1:
            absorbed = _loaded(query + channel[None, :], row_ok[:, None] & channel_ok[None, :], EMULATED)
        scores = tl.dot(absorbed, tl.trans(latents), scores, input_precision=PRECISION)
    return scores


@triton.jit
@no_type_check
def _rotated_scores(
    query, up, key_bias, key_norm, cos, sin, data, scales, minima, table, slot, token, token_ok,
    block_row, page, row, row_ok, group, groups, rows, head_rows, first_head, last_head, rank, norm_eps,
    up_row, cos_token, sin_token, page_stride, data_stride, parameter_page_stride, parameter_stride,
    PLANES: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, KEY_BLOCKS: tl.constexpr, ELEMENT: tl.constexpr, EMULATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of queries and a tile of keys that are rebuilt, normalised and rotated head by head, (ROWS, TILE)."""
    half = tl.arange(0, HALF)
    half_ok = half < HEAD_DIM // 2
    rotated = half < ROTARY_DIM // 2
    lo = tl.where(rotated, half, half + ROTARY_DIM // 2)
    hi = tl.where(rotated, half + ROTARY_DIM // 2, half + HEAD_DIM // 2)
    at, turns = token[:, None], token_ok[:, None] & rotated[None, :]
    cos_lo = tl.load(cos + at * cos_token + half[None, :], mask=turns, other=1.0).to(tl.float32)
    cos_hi = tl.load(cos + at * cos_token + half[None, :] + ROTARY_DIM // 2, mask=turns, other=1.0).to(tl.float32)
    sin_lo = tl.load(sin + at * sin_token + half[None, :], mask=turns, other=0.0).to(tl.float32)
    sin_hi = tl.load(sin + at * sin_token + half[None, :] + ROTARY_DIM // 2, mask=turns, other=0.0).to(tl.float32)
    key = tl.arange(0, KEY_BLOCK)
    if KEY_BLOCKS == 1:
        latents = _latents(
            data, scales, minima, table, slot, token_ok, block_row, group * rank + key, key < rank,
            data_stride, parameter_stride, groups * rank, page, page_stride, parameter_page_stride,
            PAGE, PLANES, ELEMENT, EMULATED,
        )  # fmt: skip
    scores = tl.zeros([ROWS, TILE], tl.float32)
    for head in range(first_head, last_head + 1):
        channels = (group * (rows // head_rows) + head) * HEAD_DIM
        k_lo = tl.zeros([TILE, HALF], tl.float32)
        k_hi = tl.zeros([TILE, HALF], tl.float32)
        for block in range(KEY_BLOCKS):  # not unrolled: all of its tiles would be in shared memory at once
            channel = block * KEY_BLOCK + key
            channel_ok = channel < rank
            if KEY_BLOCKS > 1:
                latents = _latents(
                    data, scales, minima, table, slot, token_ok, block_row, group * rank + channel, channel_ok,
                    data_stride, parameter_stride, groups * rank, page, page_stride, parameter_page_stride,
                    PAGE, PLANES, ELEMENT, EMULATED,
                )  # fmt: skip
            up_ok = channel_ok[:, None] & half_ok[None, :]
            up_lo = _loaded(up + (channels + lo)[None, :] * up_row + channel[:, None], up_ok, EMULATED)
            up_hi = _loaded(up + (channels + hi)[None, :] * up_row + channel[:, None], up_ok, EMULATED)
            k_lo = tl.dot(latents, up_lo, k_lo, input_precision=PRECISION)
            k_hi = tl.dot(latents, up_hi, k_hi, input_precision=PRECISION)
        if HAS_BIAS:
            k_lo += tl.load(key_bias + channels + lo, mask=half_ok, other=0.0).to(tl.float32)[None, :]
            k_hi += tl.load(key_bias + channels + hi, mask=half_ok, other=0.0).to(tl.float32)[None, :]
        if HAS_NORM:
            squares = tl.sum(k_lo * k_lo, 1) + tl.sum(k_hi * k_hi, 1)
            inverse = tl.rsqrt(squares / HEAD_DIM + norm_eps)[:, None]
            k_lo *= inverse * tl.load(key_norm + lo, mask=half_ok, other=0.0).to(tl.float32)[None, :]
            k_hi *= inverse * tl.load(key_norm + hi, mask=half_ok, other=0.0).to(tl.float32)[None, :]
        turned_lo = _rounded(k_lo * cos_lo - k_hi * sin_lo, ELEMENT, EMULATED)
        turned_hi = _rounded(k_hi * cos_hi + k_lo * sin_hi, ELEMENT, EMULATED)
        query_ok = (row_ok & (row // head_rows == head))[:, None] & half_ok[None, :]
        query_lo = _loaded(query + lo[None, :], query_ok, EMULATED)
        query_hi = _loaded(query + hi[None, :], query_ok, EMULATED)
        scores = tl.dot(query_lo, tl.trans(turned_lo), scores, input_precision=PRECISION)
        scores = tl.dot(query_hi, tl.trans(turned_hi), scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=["tokens", "split_tokens", "lines", "mask_batch", "mask_head", "mask_new", "mask_token"])
@no_type_check
def partials(
    query, query_scale, query_bias, up, key_bias, key_norm, cos, sin, mask, page_table, lengths,
    k_data, k_scales, k_minima, k_rows, k_table, v_data, v_scales, v_minima, v_rows, v_table,
    most_out, total_out, sums_out,
    tokens, split_tokens, lines, groups, rows, new, head_rows, block_rows, row_blocks, key_rank, value_rank,
    scaling, softcap, norm_eps,
    query_batch, query_row, up_row, cos_batch, cos_token, sin_batch, sin_token,
    mask_batch, mask_head, mask_new, mask_token, page_row,
    k_batch, k_token, k_parameter_batch, k_parameter_row, v_batch, v_token, v_parameter_batch, v_parameter_row,
    K_PLANES: tl.constexpr, K_BLOCK_TOKENS: tl.constexpr, K_HAS_ROWS: tl.constexpr,
    V_PLANES: tl.constexpr, V_BLOCK_TOKENS: tl.constexpr, V_HAS_ROWS: tl.constexpr,
    PAGE: tl.constexpr, ROTATED: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, HALF: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, KEY_BLOCK: tl.constexpr,
    KEY_BLOCKS: tl.constexpr, VALUE_BLOCK: tl.constexpr, ELEMENT: tl.constexpr, EMULATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The compressed branch of `block_rows` query rows over `split_tokens` tokens.

    The grid is (row blocks x value blocks, splits, batch x groups): programs that read the same latents run together.

    query is (batch, groups x rows, key_rank or HEAD_DIM), query_scale and query_bias (batch x groups
    x rows); up is (kv_dim, rank of a
    group), cos and sin (batch, tokens, ROTARY_DIM). The outputs are (splits, lines[, value_rank]), where the lines are
    batch x groups x rows. MASK is 0 for none, 1 for bytes that are 0 where a token is not read, 2 for what is added.

    PAGE is the tokens of a page, 0 where each sequence's latents are one after the other. With pages, page_table is
    (batch, pages) and lengths (batch); k_batch, v_batch and those of the parameters are strides of pages then, `tokens`
    a bound above the lengths, and split_tokens not read.
    """
    row_block = tl.program_id(0) % row_blocks
    value_block = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    group = tl.program_id(2) % groups
    batch = (tl.program_id(2) // groups).to(tl.int64)

    in_block = tl.arange(0, ROWS)
    row = row_block * block_rows + in_block
    row_ok = (in_block < block_rows) & (row < rows)
    line = group * rows + row  # of the batch's
    query += batch * query_batch + line[:, None] * query_row

    if PAGE > 0:
        page_table += batch * page_row
        tokens = tl.minimum(tl.load(lengths + batch).to(tl.int32), tokens)
        split_tokens = tl.cdiv(tl.cdiv(tokens, TILE), tl.num_programs(1)) * TILE
    else:
        k_data += batch * k_batch
        v_data += batch * v_batch
        if K_PLANES > 0:
            k_scales += batch * k_parameter_batch
            k_minima += batch * k_parameter_batch
        if V_PLANES > 0:
            v_scales += batch * v_parameter_batch
            v_minima += batch * v_parameter_batch
    value = value_block * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    value_ok = value < value_rank

    if ROTATED:
        first_head = row_block * block_rows // head_rows
        last_head = (tl.minimum((row_block + 1) * block_rows, rows) - 1) // head_rows
        cos += batch * cos_batch
        sin += batch * sin_batch
    else:
        key = tl.arange(0, KEY_BLOCK)
        if KEY_BLOCKS == 1:
            absorbed = _loaded(query + key[None, :], row_ok[:, None] & (key < key_rank)[None, :], EMULATED)
        else:
            absorbed = query
        of_row = batch * groups * rows + line
        if HAS_SCALE:
            scale = tl.load(query_scale + of_row, mask=row_ok, other=0.0)
        if HAS_BIAS:
            bias = tl.load(query_bias + of_row, mask=row_ok, other=0.0)

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, tokens)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        token_ok = token < last
        if PAGE == 0:
            slot = token
            page = 0
        elif PAGE % TILE == 0:
            slot = start % PAGE + tl.arange(0, TILE)
            page = tl.load(page_table + start // PAGE).to(tl.int64)
        else:
            slot = token % PAGE
            page = tl.load(page_table + token // PAGE, mask=token_ok, other=0).to(tl.int64)[:, None]
        k_row = _block_rows(slot, token_ok, k_rows, K_BLOCK_TOKENS, K_HAS_ROWS)
        if ROTATED:
            scores = _rotated_scores(
                query, up, key_bias, key_norm, cos, sin, k_data, k_scales, k_minima, k_table, slot, token, token_ok,
                k_row, page, row, row_ok, group, groups, rows, head_rows, first_head, last_head, key_rank, norm_eps,
                up_row, cos_token, sin_token, k_batch, k_token, k_parameter_batch, k_parameter_row,
                K_PLANES, PAGE, HEAD_DIM, ROTARY_DIM, HALF, HAS_BIAS, HAS_NORM, ROWS, TILE, KEY_BLOCK, KEY_BLOCKS,
                ELEMENT, EMULATED, PRECISION,
            )  # fmt: skip
        else:
            scores = _absorbed_scores(
                query, absorbed, k_data, k_scales, k_minima, k_table, slot, token_ok, k_row, page, row_ok, group,
                groups, key_rank, k_batch, k_token, k_parameter_batch, k_parameter_row,
                K_PLANES, PAGE, ROWS, TILE, KEY_BLOCK, KEY_BLOCKS, ELEMENT, EMULATED, PRECISION,
            )  # fmt: skip
            if HAS_SCALE:
                scores *= scale[:, None]
            if HAS_BIAS:
                scores += bias[:, None]

        scores *= scaling
        if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1: Triton's own tanh needs a library of the device
            scores = softcap * (2 * tl.sigmoid(scores * (2 / softcap)) - 1)
        if MASK > 0:
            at = (line // new)[:, None] * mask_head + (line % new)[:, None] * mask_new + token[None, :] * mask_token
            masked = tl.load(mask + batch * mask_batch + at, mask=row_ok[:, None] & token_ok[None, :], other=0)
            if MASK == 1:
                scores = tl.where(masked != 0, scores, float("-inf"))
            else:
                scores += masked.to(tl.float32)
        scores = tl.where(token_ok[None, :], scores, float("-inf"))

        higher = tl.maximum(most, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row that reads none of these tokens
        weights = tl.exp(scores - finite[:, None])
        older = tl.exp(most - finite)
        most = higher
        total = total * older + tl.sum(weights, 1)
        v_row = _block_rows(slot, token_ok, v_rows, V_BLOCK_TOKENS, V_HAS_ROWS)
        latents_v = _latents(
            v_data, v_scales, v_minima, v_table, slot, token_ok, v_row, group * value_rank + value,
            value_ok, v_token, v_parameter_row, groups * value_rank, page, v_batch, v_parameter_batch,
            PAGE, V_PLANES, ELEMENT, EMULATED,
        )  # fmt: skip
        sums = sums * older[:, None]
        sums = tl.dot(_rounded(weights, ELEMENT, EMULATED), latents_v, sums, input_precision=PRECISION)

    out = split.to(tl.int64) * lines + batch * groups * rows + line
    if value_block == 0:
        tl.store(most_out + out, most, mask=row_ok)
        tl.store(total_out + out, total, mask=row_ok)
    tl.store(sums_out + out[:, None] * value_rank + value[None, :], sums, mask=row_ok[:, None] & value_ok[None, :])


@triton.jit(do_not_specialize=["splits", "lines"])
@no_type_check
def join(
    most_in, total_in, sums_in, most_out, total_out, sums_out, splits, lines, rank,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The splits of one line and BLOCK latents as one partial. The grid is (lines, blocks of latents)."""
    line = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel_ok = channel < rank
    step = tl.arange(0, STEP)
    highest = tl.full([STEP], float("-inf"), tl.float32)
    for start in range(0, splits, STEP):
        part = start + step
        most = tl.load(most_in + part.to(tl.int64) * lines + line, mask=part < splits, other=float("-inf"))
        highest = tl.maximum(highest, most)
    most_of_all = tl.max(highest, 0)
    finite = tl.where(most_of_all == float("-inf"), 0.0, most_of_all)
    totals = tl.zeros([STEP], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, STEP):
        part = start + step
        part_ok = part < splits
        at = part.to(tl.int64) * lines + line
        weight = tl.exp(tl.load(most_in + at, mask=part_ok, other=float("-inf")) - finite)
        totals += weight * tl.load(total_in + at, mask=part_ok, other=0.0)
        part_sums = tl.load(
            sums_in + at[:, None] * rank + channel[None, :], mask=part_ok[:, None] & channel_ok[None, :], other=0.0
        )
        sums += tl.sum(weight[:, None] * part_sums, 0)
    if tl.program_id(1) == 0:
        tl.store(most_out + line, most_of_all)
        tl.store(total_out + line, tl.sum(totals, 0))
    tl.store(sums_out + line * rank + channel, sums, mask=channel_ok)


INTERPRETED = not isinstance(join, triton.runtime.JITFunction)  # by TRITON_INTERPRET=1, as triton was first imported

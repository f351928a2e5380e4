"""Triton kernel of attention over some of the tokens: weights of an online softmax, and sums of value latents by them.

Each program has some query rows and a range of tokens, which it goes through in tiles, with the tokens as the rows of
the first product and the latents as those of the second, as wide products of tensor cores want them:

    logits   (tokens, rows) = latents (tokens, rank) q~^T of absorbed queries, or the products that `scores` wrote
    sums     (latents, rows) += value latents^T (latents, tokens) weights

All heads of a head group share latents, as in multi-query attention, so that a tile is loaded and unpacked once for all
rows of a program. Value latents too many for one accumulator are blocks of the grid, each of which computes the logits
again.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from cskv.attention.triton.tiles import block_rows_of, loaded, piece, piece_channels, places, rounded


@triton.jit
@no_type_check
def _query_piece(
    query, row_ok, rank, plane_bytes, start,
    INDEX: tl.constexpr, SIZE: tl.constexpr, BY_PLANES: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The channels of a piece of absorbed queries, (latents of a piece, rows)."""
    latent, latent_ok = piece_channels(rank, plane_bytes, start, INDEX, SIZE, BY_PLANES)
    return loaded(query + latent[:, None], latent_ok[:, None] & row_ok[None, :], EMULATED)


@triton.jit
@no_type_check
def _store_sums(
    sums, out, row_ok, value_rank, plane_bytes, start,
    INDEX: tl.constexpr, SIZE: tl.constexpr, BY_PLANES: tl.constexpr,
):  # fmt: skip
    latent, latent_ok = piece_channels(value_rank, plane_bytes, start, INDEX, SIZE, BY_PLANES)
    tl.store(out + latent[:, None], sums, mask=latent_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["tokens", "begin", "lines", "mask_batch", "mask_head", "mask_new", "mask_token"])
@no_type_check
def partials(
    query, query_scale, query_bias, products, mask, page_table, lengths, k_data, k_scales, k_minima, k_rows, k_table,
    v_data, v_scales, v_minima, v_rows, v_table, most_out, total_out, sums_out, tokens, begin, lines, groups, rows,
    new, block_rows, row_blocks, key_rank, k_units, k_plane, value_rank, v_units, v_plane, scaling, softcap,
    query_batch, query_row, products_batch, mask_batch, mask_head, mask_new, mask_token, page_row, k_batch, k_token,
    k_parameter_batch, k_parameter_row, v_batch, v_token, v_parameter_batch, v_parameter_row,
    K_UNIT: tl.constexpr, K_PLANES: tl.constexpr, K_BITS: tl.constexpr, K_BY_PLANES: tl.constexpr,
    K_BLOCK_TOKENS: tl.constexpr, K_BLOCK_CHANNELS: tl.constexpr, K_BLOCKS_OF: tl.constexpr,
    K_CHANNELS_OF: tl.constexpr, K_HAS_ROWS: tl.constexpr, V_UNIT: tl.constexpr, V_PLANES: tl.constexpr,
    V_BITS: tl.constexpr, V_BY_PLANES: tl.constexpr, V_BLOCK_TOKENS: tl.constexpr, V_BLOCK_CHANNELS: tl.constexpr,
    V_BLOCKS_OF: tl.constexpr, V_CHANNELS_OF: tl.constexpr, V_HAS_ROWS: tl.constexpr, PAGE: tl.constexpr,
    HAS_PRODUCTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    K2: tl.constexpr, K3: tl.constexpr, K_BLOCKS: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    V3: tl.constexpr, STAGES: tl.constexpr, ELEMENT: tl.constexpr, EMULATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The compressed branch of `block_rows` query rows over a range of the tokens from `begin` on.

    The grid is (row blocks x value blocks, ranges, batch x groups): programs that read the same latents run together.

    With HAS_PRODUCTS, products is (batch, tokens from `begin` on, lines), and nothing else is read of keys. Else query
    is (batch, groups x rows, key_rank), query_scale and query_bias (batch x groups x rows). The outputs are (ranges,
    lines of the whole batch[, value_rank]). MASK is 0 for none, 1 for bytes that are 0 where a token is not read, 2 for
    what is added. Key latents come in pieces as in `scores`; value latents in the pieces V0 to V3, or in blocks of V0.

    PAGE, page_table, lengths and tokens are as in `scores`.
    """
    row_block = tl.program_id(0) % row_blocks
    value_block = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    group = tl.program_id(2) % groups
    batch = (tl.program_id(2) // groups).to(tl.int64)
    k_readable = k_units * K_UNIT
    v_readable = v_units * V_UNIT

    in_block = tl.arange(0, ROWS)
    row = row_block * block_rows + in_block
    row_ok = (in_block < block_rows) & (row < rows)
    line = group * rows + row  # of the sequence's
    of_row = batch * groups * rows + line
    if HAS_PRODUCTS:
        products += batch * products_batch + line[None, :]
    else:
        query += batch * query_batch + line[None, :] * query_row
    if not HAS_PRODUCTS and K_BLOCKS == 1:
        query0 = _query_piece(query, row_ok, key_rank, k_plane, 0, 0, K0, K_BY_PLANES, EMULATED)
        if K1 > 0:
            query1 = _query_piece(query, row_ok, key_rank, k_plane, K0, 1, K1, K_BY_PLANES, EMULATED)
        if K2 > 0:
            query2 = _query_piece(query, row_ok, key_rank, k_plane, K0 + K1, 2, K2, K_BY_PLANES, EMULATED)
        if K3 > 0:
            query3 = _query_piece(query, row_ok, key_rank, k_plane, K0 + K1 + K2, 3, K3, K_BY_PLANES, EMULATED)
    if HAS_SCALE:
        scale = tl.load(query_scale + of_row, mask=row_ok, other=0.0)
    if HAS_BIAS:
        bias = tl.load(query_bias + of_row, mask=row_ok, other=0.0)
    if PAGE > 0:
        page_table += batch * page_row
        tokens = tl.minimum(tl.load(lengths + batch).to(tl.int32), tokens)
    else:
        k_data += batch * k_batch
        v_data += batch * v_batch
        if K_PLANES > 0:
            k_scales += batch * k_parameter_batch
            k_minima += batch * k_parameter_batch
        if V_PLANES > 0:
            v_scales += batch * v_parameter_batch
            v_minima += batch * v_parameter_batch
    if MASK > 0:
        mask += batch * mask_batch + (line // new)[None, :] * mask_head + (line % new)[None, :] * mask_new

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE, ROWS], tl.float32)
    sums0 = tl.zeros([V0, ROWS], tl.float32)
    if V1 > 0:
        sums1 = tl.zeros([V1, ROWS], tl.float32)
    if V2 > 0:
        sums2 = tl.zeros([V2, ROWS], tl.float32)
    if V3 > 0:
        sums3 = tl.zeros([V3, ROWS], tl.float32)
    split_tokens = tl.cdiv(tl.cdiv(tl.maximum(tokens - begin, 0), TILE), tl.num_programs(1)) * TILE
    first = begin + split * split_tokens
    last = tl.minimum(first + split_tokens, tokens)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        token_ok = token < last
        slot, first_slot, page = places(start, token, token_ok, page_table, TILE, PAGE)
        if HAS_PRODUCTS:
            at = (token - begin).to(tl.int64)[:, None] * lines
            scores = tl.load(products + at, mask=token_ok[:, None] & row_ok[None, :], other=0.0)
        else:
            k_row = block_rows_of(slot, token_ok, k_rows, K_BLOCK_TOKENS, K_HAS_ROWS)
            if K_BLOCKS == 1:
                latents = piece(
                    k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                    groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                    k_parameter_batch, 0, 0, K0, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS, K_BLOCKS_OF,
                    K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                )  # fmt: skip
                scores = tl.dot(latents, query0, input_precision=PRECISION)
                if K1 > 0:
                    latents = piece(
                        k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                        groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                        k_parameter_batch, K0, 1, K1, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS, K_BLOCKS_OF,
                        K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                    )  # fmt: skip
                    scores = tl.dot(latents, query1, scores, input_precision=PRECISION)
                if K2 > 0:
                    latents = piece(
                        k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                        groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                        k_parameter_batch, K0 + K1, 2, K2, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS,
                        K_BLOCKS_OF, K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                    )  # fmt: skip
                    scores = tl.dot(latents, query2, scores, input_precision=PRECISION)
                if K3 > 0:
                    latents = piece(
                        k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                        groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                        k_parameter_batch, K0 + K1 + K2, 3, K3, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS,
                        K_BLOCKS_OF, K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                    )  # fmt: skip
                    scores = tl.dot(latents, query3, scores, input_precision=PRECISION)
            else:
                scores = tl.zeros([TILE, ROWS], tl.float32)
                for block in range(K_BLOCKS):
                    latents = piece(
                        k_data, k_scales, k_minima, k_table, slot, first_slot, last - start, token_ok, k_row, group,
                        groups, key_rank, k_readable, k_plane, k_token, k_parameter_row, page, k_batch,
                        k_parameter_batch, block * K0, 0, K0, K_BITS, K_BY_PLANES, K_PLANES, K_BLOCK_CHANNELS,
                        K_BLOCKS_OF, K_CHANNELS_OF, PAGE, ELEMENT, EMULATED,
                    )  # fmt: skip
                    of_block = _query_piece(query, row_ok, key_rank, k_plane, block * K0, 0, K0, K_BY_PLANES, EMULATED)
                    scores = tl.dot(latents, of_block, scores, input_precision=PRECISION)
            if HAS_SCALE:
                scores *= scale[None, :]
            if HAS_BIAS:
                scores += bias[None, :]

        scores *= scaling
        if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1: Triton's own tanh needs a library of the device
            scores = softcap * (2 * tl.sigmoid(scores * (2 / softcap)) - 1)
        if MASK > 0:
            at = token.to(tl.int64)[:, None] * mask_token
            masked = tl.load(mask + at, mask=row_ok[None, :] & token_ok[:, None], other=0)
            if MASK == 1:
                scores = tl.where(masked != 0, scores, float("-inf"))
            else:
                scores += masked.to(tl.float32)
        scores = tl.where(token_ok[:, None], scores, float("-inf"))

        higher = tl.maximum(most, tl.max(scores, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row that reads none of these tokens
        weights = tl.exp(scores - finite[None, :])
        older = tl.exp(most - finite)
        most = higher
        total = total * older[None, :] + weights
        weights = rounded(weights, ELEMENT, EMULATED)
        v_row = block_rows_of(slot, token_ok, v_rows, V_BLOCK_TOKENS, V_HAS_ROWS)
        latents = piece(
            v_data, v_scales, v_minima, v_table, slot, first_slot, last - start, token_ok, v_row, group, groups,
            value_rank, v_readable, v_plane, v_token, v_parameter_row, page, v_batch, v_parameter_batch,
            value_block * V0, 0, V0, V_BITS, V_BY_PLANES, V_PLANES, V_BLOCK_CHANNELS, V_BLOCKS_OF, V_CHANNELS_OF,
            PAGE, ELEMENT, EMULATED,
        )  # fmt: skip
        sums0 = tl.dot(tl.trans(latents), weights, sums0 * older[None, :], input_precision=PRECISION)
        if V1 > 0:
            latents = piece(
                v_data, v_scales, v_minima, v_table, slot, first_slot, last - start, token_ok, v_row, group, groups,
                value_rank, v_readable, v_plane, v_token, v_parameter_row, page, v_batch, v_parameter_batch, V0, 1,
                V1, V_BITS, V_BY_PLANES, V_PLANES, V_BLOCK_CHANNELS, V_BLOCKS_OF, V_CHANNELS_OF, PAGE, ELEMENT,
                EMULATED,
            )  # fmt: skip
            sums1 = tl.dot(tl.trans(latents), weights, sums1 * older[None, :], input_precision=PRECISION)
        if V2 > 0:
            latents = piece(
                v_data, v_scales, v_minima, v_table, slot, first_slot, last - start, token_ok, v_row, group, groups,
                value_rank, v_readable, v_plane, v_token, v_parameter_row, page, v_batch, v_parameter_batch, V0 + V1,
                2, V2, V_BITS, V_BY_PLANES, V_PLANES, V_BLOCK_CHANNELS, V_BLOCKS_OF, V_CHANNELS_OF, PAGE, ELEMENT,
                EMULATED,
            )  # fmt: skip
            sums2 = tl.dot(tl.trans(latents), weights, sums2 * older[None, :], input_precision=PRECISION)
        if V3 > 0:
            latents = piece(
                v_data, v_scales, v_minima, v_table, slot, first_slot, last - start, token_ok, v_row, group, groups,
                value_rank, v_readable, v_plane, v_token, v_parameter_row, page, v_batch, v_parameter_batch,
                V0 + V1 + V2, 3, V3, V_BITS, V_BY_PLANES, V_PLANES, V_BLOCK_CHANNELS, V_BLOCKS_OF, V_CHANNELS_OF,
                PAGE, ELEMENT, EMULATED,
            )  # fmt: skip
            sums3 = tl.dot(tl.trans(latents), weights, sums3 * older[None, :], input_precision=PRECISION)

    out = split.to(tl.int64) * lines * (tl.num_programs(2) // groups) + of_row
    if value_block == 0:
        tl.store(most_out + out, most, mask=row_ok)
        tl.store(total_out + out, tl.sum(total, 0), mask=row_ok)
    sums_out += out[None, :] * value_rank
    _store_sums(sums0, sums_out, row_ok, value_rank, v_plane, value_block * V0, 0, V0, V_BY_PLANES)
    if V1 > 0:
        _store_sums(sums1, sums_out, row_ok, value_rank, v_plane, V0, 1, V1, V_BY_PLANES)
    if V2 > 0:
        _store_sums(sums2, sums_out, row_ok, value_rank, v_plane, V0 + V1, 2, V2, V_BY_PLANES)
    if V3 > 0:
        _store_sums(sums3, sums_out, row_ok, value_rank, v_plane, V0 + V1 + V2, 3, V3, V_BY_PLANES)

"""Triton kernel of what ends a step: ranges are joined, values expanded, the exact tokens attended to, all at once.

A program has one query row. These are small operations, whose launches one by one would take longer than reading a
compressed cache does.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _finite(x):
    """The largest logit, or 0 where a row reads nothing."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(
    do_not_specialize=["splits", "lines", "exact", "mask_batch", "mask_head", "mask_new", "mask_token", "sealed"]
)
@no_type_check
def outputs(
    query, keys, values, exists, mask, sinks, most_in, total_in, sums_in, up, value_bias, out,
    splits, lines, exact, sealed, new, head_rows, q_heads, value_rank, scaling, softcap,
    query_batch, query_head, query_new, key_batch, key_head, key_token, value_batch, value_head, value_token,
    exists_batch, exists_token, mask_batch, mask_head, mask_new, mask_token, up_row,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, MASK: tl.constexpr, HAS_EXISTS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SEALED: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, LATENTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The output of one query row, all in fp32. The grid is (lines of the whole batch).

    query is (batch, q_heads, new, HEAD_DIM), keys and values (batch, kv_heads, exact, HEAD_DIM), exists (batch, exact)
    bytes, mask as in `partials` for all tokens, `sealed` of which come before the exact ones, and out as query,
    contiguous. Without a mask a new token reads exact ones up to its own. most, total and sums are those of `partials`,
    up is (kv_dim, value_rank), in BLOCKS blocks of LATENTS.
    """
    line = tl.program_id(0)
    index = line % new
    head = line // new % q_heads
    batch = (line // (new * q_heads)).to(tl.int64)
    kv_head = line % (new * q_heads) // head_rows
    channel = tl.arange(0, CHANNELS)
    channel_ok = channel < HEAD_DIM
    query += batch * query_batch + head * query_head + index * query_new
    row = tl.load(query + channel, mask=channel_ok, other=0.0).to(tl.float32)
    keys += batch * key_batch + kv_head * key_head
    values += batch * value_batch + kv_head * value_head

    most = tl.max(tl.full([1], float("-inf"), tl.float32), 0)
    total = tl.sum(tl.zeros([1], tl.float32), 0)
    sums = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, exact, TILE):
        token = start + tl.arange(0, TILE)
        token_ok = token < exact
        ok = token_ok[:, None] & channel_ok[None, :]
        key = tl.load(keys + token[:, None] * key_token + channel[None, :], mask=ok, other=0.0).to(tl.float32)
        value = tl.load(values + token[:, None] * value_token + channel[None, :], mask=ok, other=0.0).to(tl.float32)
        logits = tl.sum(key * row[None, :], 1) * scaling
        if HAS_SOFTCAP:
            logits = softcap * (2 * tl.sigmoid(logits * (2 / softcap)) - 1)
        if HAS_EXISTS:
            there = tl.load(exists + batch * exists_batch + token * exists_token, mask=token_ok, other=0)
            token_ok = token_ok & (there != 0)
        if MASK == 0:
            token_ok = token_ok & (token <= exact - new + index)
        else:
            at = batch * mask_batch + head * mask_head + index * mask_new + (sealed + token).to(tl.int64) * mask_token
            masked = tl.load(mask + at, mask=token_ok, other=0)
            if MASK == 1:
                token_ok = token_ok & (masked != 0)
            else:
                logits += masked.to(tl.float32)
        logits = tl.where(token_ok, logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 0))
        weights = tl.exp(logits - _finite(higher))
        older = tl.exp(most - _finite(higher))
        total = total * older + tl.sum(weights, 0)
        sums = sums * older + tl.sum(weights[:, None] * value, 0)
        most = higher

    if HAS_SEALED:
        step = tl.arange(0, STEP)
        highest = tl.full([STEP], float("-inf"), tl.float32)
        for start in range(0, splits, STEP):
            part = start + step
            of_part = tl.load(most_in + part.to(tl.int64) * lines + line, mask=part < splits, other=float("-inf"))
            highest = tl.maximum(highest, of_part)
        all_most = tl.maximum(most, tl.max(highest, 0))
        older = tl.exp(most - _finite(all_most))
        total *= older
        sums *= older
        totals = tl.zeros([STEP], tl.float32)
        for start in range(0, splits, STEP):
            part = start + step
            at = part.to(tl.int64) * lines + line
            weights = tl.exp(tl.load(most_in + at, mask=part < splits, other=float("-inf")) - _finite(all_most))
            totals += weights * tl.load(total_in + at, mask=part < splits, other=0.0)
        sealed_total = tl.sum(totals, 0)
        rows = (kv_head * HEAD_DIM + channel)[:, None] * up_row
        for block in range(BLOCKS):
            latent = block * LATENTS + tl.arange(0, LATENTS)
            latent_ok = latent < value_rank
            matrix = tl.load(up + rows + latent[None, :], mask=channel_ok[:, None] & latent_ok[None, :], other=0.0)
            latents = tl.zeros([LATENTS], tl.float32)
            for start in range(0, splits, STEP):
                part = start + step
                at = part.to(tl.int64) * lines + line
                weights = tl.exp(tl.load(most_in + at, mask=part < splits, other=float("-inf")) - _finite(all_most))
                part_ok = (part < splits)[:, None] & latent_ok[None, :]
                of_parts = tl.load(sums_in + at[:, None] * value_rank + latent[None, :], mask=part_ok, other=0.0)
                latents += tl.sum(weights[:, None] * of_parts, 0)
            sums += tl.sum(matrix.to(tl.float32) * latents[None, :], 1)
        if HAS_BIAS:
            bias = tl.load(value_bias + kv_head * HEAD_DIM + channel, mask=channel_ok, other=0.0).to(tl.float32)
            sums += bias * sealed_total
        total += sealed_total
        most = all_most
    if HAS_SINKS:  # logits that take weight and give nothing
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(most, sink)
        older = tl.exp(most - higher)
        total = total * older + tl.exp(sink - higher)
        sums *= older
    result = tl.where(total > 0, sums / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(out + line.to(tl.int64) * HEAD_DIM + channel, result.to(out.dtype.element_ty), mask=channel_ok)

"""Attention on the compressed cache with torch, a tile of tokens at a time, on any device.

Latents are read once. The scores of a tile are (rows, tokens), rows being query heads times new tokens:

    keys that are linear in their latents      scores = (U_k^T q) c_k      nothing is rebuilt
    keys that are rotated after rebuilding     scores = q RoPE(U_k c_k)    (tokens, kv_dim) at a time
    values                                     sums += p c_v, and U_v sums once at the end

Tiles are joined by log-sum-exp, and so is the exact branch. The longest tensor that a step makes is a tile.

Products are computed in the query's dtype, except that float16 is widened to float32, a tile at a time: absorbed
queries, scores and sums of weights all leave its range in real models.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.inputs import AttentionInputs, Logits, Rotation, beyond, causal_mask, split_heads
from cskv.attention.partial import Partial
from cskv.factorization.factors import Factors
from cskv.latents.view import Latents, PlainLatents, View
from cskv.scratch import Scratch

SCORES = 2**19  # numbers in the scores of a tile
REBUILT = 2**21  # numbers in a tile's rebuilt keys, and in its unpacked latents: what was fastest on two cores
LEAST_TILE = 64


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"], inputs: AttentionInputs, scratch: Scratch | None = None
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Compute `cskv.attention.dispatch.attention`, with sums in fp32.

    Query, exact tokens and factors are of one dtype, in which the result is given.
    """
    if query.dtype == torch.float16:
        return attention(query.float(), inputs.to(torch.float32), scratch).to(query.dtype)
    part, k, v = exact(query, inputs.view, inputs.logits), inputs.view.k, inputs.view.v
    if k is not None and v is not None and (length := k.length):
        part = part.joined(_sealed(query, inputs, k, v, length, Scratch() if scratch is None else scratch))
    return part.result(inputs.logits.sinks).to(query.dtype)


def exact(query: Tensor, view: View, logits: Logits) -> Partial:
    """Attend to the exact branch."""
    keys, values = view.keys, view.values
    if query.dtype == torch.float16:
        query, keys, values = query.float(), keys.float(), values.float()
    scores = logits.of(per_head(query, keys.transpose(2, 3)), 0 if logits.mask is None else view.sealed)
    if logits.mask is None and query.shape[2] > 1:
        scores.masked_fill_(~causal_mask(query.shape[2], keys.shape[2], query.device), -torch.inf)
    if view.exists is not None:
        scores.masked_fill_(~view.exists[:, None, None], -torch.inf)
    most, total = _weigh(scores)
    return Partial(most, total, per_head(scores.to(values.dtype), values).to(total.dtype))


def _sealed(query: Tensor, inputs: AttentionInputs, k: Latents, v: Latents, length: int, scratch: Scratch) -> Partial:
    """Attend to the compressed branch. Only the number of tiles follows from its length: what torch.compile makes of
    this holds for other lengths too.
    """
    factors, rotation, logits, value_heads = inputs.factors, inputs.rotation, inputs.logits, inputs.value_heads
    dtype, part = query.dtype, None
    absorbed, bias = _absorbed(query, factors.k) if rotation is None else (query, None)
    tile = _tile(query, inputs, k, v)
    tiles = -(-length // tile)
    for index in range(tiles):
        start, stop = index * tile, None if index == tiles - 1 else (index + 1) * tile
        latents = k.read(start, stop, scratch)
        if latents.dtype != dtype:
            latents = _copied(latents, dtype, "latents", scratch)
        if rotation is None:
            products = _by_latents(absorbed, bias, latents, factors.k.groups, scratch)
        else:
            products = _by_keys(query, latents, start, factors.k, rotation, scratch)
        if inputs.key_offset is not None:
            products = products + inputs.key_offset.products(query, start, latents.shape[1])
        scores = logits.of(products, start)
        if k.lengths is not None:
            scores.masked_fill_(beyond(k.lengths, start, start + scores.shape[-1]), -torch.inf)
        most, total = _weigh(scores)
        latents = v.read(start, stop, scratch)
        if latents.dtype != dtype:
            latents = _copied(latents, dtype, "latents", scratch)
        if value_heads is None:
            sums = _summed(scores, latents, factors.v, scratch)
        else:
            values = value_heads(factors.v.expand(latents))
            sums = per_head(scores.to(values.dtype), values).to(total.dtype)
        of_tile = Partial(most, total, sums)
        part = of_tile if part is None else part.joined(of_tile)
    assert part is not None, "there is at least one tile"
    return part if value_heads is not None else expanded(part, factors.v, query.shape[3])


def _tile(query: Tensor, inputs: AttentionInputs, k: Latents, v: Latents) -> int:
    """Count the tokens of a tile: the most that keep its scores, and what is rebuilt or unpacked, within bounds.

    Blocks of packed latents are not cut, so that they are unpacked as blocks.
    """
    batch, heads, new, _ = query.shape
    factors = inputs.factors
    width = 1 if inputs.rotation is None and inputs.value_heads is None else factors.k.up.shape[0]
    for latents, own in ((k, factors.k), (v, factors.v)):
        if not isinstance(latents, PlainLatents):
            width = max(width, 2 * own.down.shape[0])
    tile = min(SCORES // (batch * heads * new), REBUILT // (batch * width))
    step = math.lcm(LEAST_TILE, k.granularity, v.granularity)
    return max(1, tile // step) * step


def _weigh(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by weights exp(logit - largest); return the largest logit and the sum of the weights.

    Logits of minus infinity weigh nothing, also where there are no others: the largest is never infinite itself.
    """
    most = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    return most, scores.sub_(most).exp_().sum(-1, keepdim=True)


def per_head(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply (batch, q_heads, new, a) by the (batch, kv_heads, a, b) of each query head's kv head."""
    batch, heads, new, inner = rows.shape
    grouped = rows.reshape(batch, matrices.shape[1], -1, inner)
    return torch.matmul(grouped, matrices).view(batch, heads, new, -1)


def _absorbed(query: Tensor, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """Give the keys' up-projection and bias to the query: (batch, q_heads, new, rank of a group) and (..., 1)."""
    head_dim, bias = query.shape[3], factors.bias
    products = None if bias is None else per_head(query, bias.view(1, -1, head_dim, 1))
    return per_head(query, factors.up.unflatten(0, (-1, head_dim))[None]), products


def _by_latents(absorbed: Tensor, bias: Tensor | None, latents: Tensor, groups: int, scratch: Scratch) -> Tensor:
    """Multiply absorbed queries by latents."""
    rows = absorbed.flatten(1, 2)
    shape = (rows.shape[0], rows.shape[1], latents.shape[1])
    products = scratch.take("products", shape, latents.dtype, latents.device)
    _multiply(rows, latents.transpose(1, 2), groups, 1, products)
    wide = torch.promote_types(products.dtype, torch.float32)
    if wide != products.dtype:
        products = _copied(products, wide, "scores", scratch)
    products = products.view(*absorbed.shape[:3], -1)
    return products if bias is None else products.add_(bias)


def _by_keys(
    query: Tensor, latents: Tensor, start: int, factors: Factors, rotation: Rotation, scratch: Scratch
) -> Tensor:
    """Multiply queries by keys that are rebuilt from latents, and rotated or normalised then."""
    shape = (*latents.shape[:2], factors.up.shape[0])
    channels = factors.expand(latents, scratch.take("channels", shape, latents.dtype, latents.device))
    if rotation.is_plain and rotation.norm is None:
        heads = split_heads(channels, query.shape[3])
        keys = scratch.take("keys", tuple(heads.shape), heads.dtype, heads.device)
        keys = rotation.rotated(heads, start, keys)
    else:  # products with strided matrices are many times slower
        keys = rotation.keys(channels, start).contiguous()
    return per_head(query, keys.transpose(2, 3))


def _summed(weights: Tensor, latents: Tensor, factors: Factors, scratch: Scratch) -> Tensor:
    """Sum value latents by weights of a tile."""
    batch, heads, new, _ = weights.shape
    rows = weights.flatten(1, 2)
    if rows.dtype != latents.dtype:
        rows = _copied(rows, latents.dtype, "weights", scratch)
    sums = latents.new_empty(batch, heads * new, factors.up.shape[1])
    _multiply(rows, latents, latents.shape[2] // factors.up.shape[1], 2, sums)
    return sums.to(weights.dtype).view(batch, heads, new, -1)


def _multiply(rows: Tensor, latents: Tensor, groups: int, dim: int, out: Tensor) -> None:
    """Multiply the rows of each group of heads, (batch, rows, a), by its part of the latents along `dim`."""
    parts = zip(rows.chunk(groups, 1), latents.chunk(groups, dim), out.chunk(groups, 1), strict=True)
    for own, matrices, products in parts:
        if not rows.is_cpu:
            products.copy_(torch.bmm(own, matrices))
            continue
        # A batched product would first copy matrices that are not packed together in memory.
        for row, matrix, product in zip(own, matrices, products, strict=True):
            if torch.compiler.is_compiling():
                product.copy_(torch.mm(row, matrix))
            else:
                torch.mm(row, matrix, out=product)


def _copied(x: Tensor, dtype: torch.dtype, name: str, scratch: Scratch) -> Tensor:
    """Convert a tile's numbers in scratch memory."""
    return scratch.take(name, tuple(x.shape), dtype, x.device).copy_(x)


def expanded(part: Partial, factors: Factors, head_dim: int) -> Partial:
    """Turn sums of value latents into sums of values: U_v and the bias once per query head, on the mean latents.

    The sums themselves grow with the tokens, and leave the range of float16.
    """
    up = factors.up.unflatten(0, (-1, head_dim)).transpose(1, 2)[None]
    means = per_head((part.sums / part.total.clamp(min=1)).to(up.dtype), up).to(part.sums.dtype)
    if factors.bias is not None:
        heads = factors.bias.view(1, -1, 1, head_dim)
        means = means + heads.repeat_interleave(means.shape[1] // heads.shape[1], dim=1)
    return Partial(part.most, part.total, means * part.total)

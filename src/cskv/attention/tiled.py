"""Attention on the compressed cache with torch, a tile of tokens at a time, on any device.

Latents are read once. The scores of a tile are (rows, tokens), rows being query heads times new tokens:

    keys that are linear in their latents      scores = (U_k^T q) c_k      nothing is rebuilt
    keys that are rotated after rebuilding     scores = q RoPE(U_k c_k)    (tokens, kv_dim) at a time
    values                                     sums += p c_v, and U_v sums once at the end

Tiles are joined by log-sum-exp, and so is the exact branch. The longest tensor that a step makes is a tile.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.inputs import AttentionInputs, Logits, Rotation, ToHeads, beyond, causal_mask, split_heads
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
    """Compute `cskv.attention.dispatch.attention` in the query's dtype with sums in fp32."""
    scratch = Scratch() if scratch is None else scratch
    view, factors, rope, logits, value_heads = (
        inputs.view, inputs.factors, inputs.rotation, inputs.logits, inputs.value_heads
    )  # fmt: skip
    parts = [exact(query, view, logits)]
    if view.k is not None and view.v is not None and view.sealed:
        keys = _Absorbed(query, factors.k, scratch) if rope is None else _Rebuilt(query, factors.k, rope, scratch)
        values = (
            _Summed(query, factors.v, scratch) if value_heads is None else _RebuiltValues(query, factors.v, value_heads)
        )
        parts.append(values.expanded(_sealed(query, view, keys, values, logits, scratch)))
    return reduce(Partial.joined, parts).result(logits.sinks).to(query.dtype)


def exact(query: Tensor, view: View, logits: Logits) -> Partial:
    """The exact branch."""
    scores = logits.of(_wide(per_head(query, view.keys.transpose(2, 3))), view.sealed)
    if logits.mask is None and query.shape[2] > 1:
        reads = causal_mask(query.shape[2], view.keys.shape[2], query.device)
        scores.masked_fill_(~reads, torch.finfo(scores.dtype).min)
    if view.exists is not None:
        scores.masked_fill_(~view.exists[:, None, None], torch.finfo(scores.dtype).min)
    most, total, weights = _weights(scores)
    return Partial(most, total, _wide(per_head(weights.to(view.values.dtype), view.values)))


def _sealed(
    query: Tensor,
    view: View,
    keys: _Absorbed | _Rebuilt,
    values: _Summed | _RebuiltValues,
    logits: Logits,
    scratch: Scratch,
) -> Partial:
    """The compressed branch, with sums as `values` gives them."""
    k, v, parts = view.k, view.v, None
    if k is None or v is None:
        raise ValueError("the view has no compressed branch")
    tile = _tile(query, (k, v), max(keys.width, values.width))
    for start in range(0, k.length, tile):
        stop = min(start + tile, k.length)
        scores = logits.of(keys.scores(k.read(start, stop, scratch), start), start)
        if k.lengths is not None:
            scores.masked_fill_(beyond(k.lengths, start, stop), torch.finfo(scores.dtype).min)
        most, total, weights = _weights(scores)
        part = Partial(most, total, values.sums(weights, v.read(start, stop, scratch)))
        parts = part if parts is None else parts.joined(part)
    return parts  # type: ignore[return-value]


def _tile(query: Tensor, latents: tuple[Latents, Latents], rebuilt: int) -> int:
    """Tokens per tile: the most that keep its scores, and what is rebuilt or unpacked, within bounds.

    Blocks of packed latents are not cut, so that they are unpacked as blocks.
    """
    batch, heads, new, _ = query.shape
    packed = [part for part in latents if not isinstance(part, PlainLatents)]
    width = max(rebuilt, *(2 * part.rank for part in packed), 1)
    tile = min(SCORES // (batch * heads * new), REBUILT // (batch * width))
    step = math.lcm(LEAST_TILE, *(part.granularity for part in packed))
    return max(1, tile // step) * step


def _wide(x: Tensor) -> Tensor:
    """In the dtype of logits and sums: fp32, or fp64 where all is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weights(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit, the sum of weights, and the weights exp(logit - largest), which replace the scores."""
    most = scores.amax(-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    return most, weights.sum(-1, keepdim=True), weights


def per_head(rows: Tensor, matrices: Tensor) -> Tensor:
    """(batch, q_heads, new, a) times the (batch, kv_heads, a, b) of each query head's kv head."""
    batch, heads, new, inner = rows.shape
    grouped = rows.reshape(batch, matrices.shape[1], -1, inner)
    return torch.matmul(grouped, matrices).view(batch, heads, new, -1)


class _Absorbed:
    """Keys as linear functions of their latents: the query takes the up-projection."""

    width = 0  # numbers per token that are rebuilt

    def __init__(self, query: Tensor, factors: Factors, scratch: Scratch) -> None:
        self._shape, self._groups, self._scratch = query.shape[:3], factors.groups, scratch
        head_dim = query.shape[3]
        self._query = _to_groups(per_head(query, factors.up.unflatten(0, (-1, head_dim))[None]), factors.groups)
        self._bias: Tensor | None = None
        if factors.bias is not None:
            self._bias = _wide(per_head(query, factors.bias.view(1, -1, head_dim, 1)))

    def scores(self, latents: Tensor, _start: int) -> Tensor:
        batch, heads, new = self._shape
        shape = (batch, heads * new, latents.shape[1])
        products = self._scratch.take("products", shape, latents.dtype, latents.device)
        parts = zip(self._query, latents.chunk(self._groups, dim=2), products.chunk(self._groups, dim=1), strict=True)
        for query, part, out in parts:
            _multiply(query, part.transpose(1, 2), out)
        scores = _copied(products, torch.promote_types(products.dtype, torch.float32), self._scratch, "scores")
        scores = scores.view(batch, heads, new, -1)
        return scores if self._bias is None else scores.add_(self._bias)


class _Rebuilt:
    """Keys that are rotated, or normalised, after they were rebuilt."""

    def __init__(self, query: Tensor, factors: Factors, rope: Rotation, scratch: Scratch) -> None:
        self.width = factors.kv_dim
        self._query, self._factors, self._rope, self._scratch = query, factors, rope, scratch

    def scores(self, latents: Tensor, start: int) -> Tensor:
        shape = (*latents.shape[:2], self.width)
        channels = self._factors.expand(latents, self._scratch.take("channels", shape, latents.dtype, latents.device))
        return _wide(per_head(self._query, self._keys(channels, start).transpose(2, 3)))

    def _keys(self, channels: Tensor, start: int) -> Tensor:
        if not self._rope.is_plain or self._rope.norm is not None:
            return self._rope.keys(channels, start).contiguous()  # products with strided matrices are many times slower
        heads = split_heads(channels, self._query.shape[3])
        keys = self._scratch.take("keys", tuple(heads.shape), heads.dtype, heads.device)
        return self._rope.rotated(heads, start, keys)


class _Summed:
    """Values as linear functions of their latents: weights are summed with these."""

    width = 0

    def __init__(self, query: Tensor, factors: Factors, scratch: Scratch) -> None:
        self._head_dim, self._factors, self._scratch = query.shape[3], factors, scratch

    def sums(self, weights: Tensor, latents: Tensor) -> Tensor:
        batch, heads, new, _ = weights.shape
        groups = self._factors.groups
        weights = _copied(weights, latents.dtype, self._scratch, "weights").flatten(1, 2)
        sums = latents.new_empty(batch, heads * new, latents.shape[2] // groups)
        parts = zip(weights.chunk(groups, dim=1), latents.chunk(groups, dim=2), sums.chunk(groups, dim=1), strict=True)
        for rows, part, out in parts:
            _multiply(rows, part, out)
        return _wide(sums).view(batch, heads, new, -1)

    def expanded(self, part: Partial) -> Partial:
        return expanded(part, self._factors, self._head_dim)


class _RebuiltValues:
    """Values that are normalised after they were rebuilt (Gemma4)."""

    def __init__(self, _query: Tensor, factors: Factors, heads: ToHeads) -> None:
        self.width = factors.kv_dim
        self._factors, self._heads = factors, heads

    def sums(self, weights: Tensor, latents: Tensor) -> Tensor:
        values = self._heads(self._factors.expand(latents))
        return _wide(per_head(weights.to(values.dtype), values))

    def expanded(self, part: Partial) -> Partial:
        return part


def _multiply(rows: Tensor, matrices: Tensor, out: Tensor) -> None:
    """(batch, a, b) times (batch, b, c), where each matrix is a part of a larger one."""
    if not rows.is_cpu:
        out.copy_(torch.bmm(rows, matrices))
        return
    # A batched product would first copy matrices that are not packed together in memory.
    for row, matrix, product in zip(rows, matrices, out, strict=True):
        if torch.compiler.is_compiling():
            product.copy_(torch.mm(row, matrix))
        else:
            torch.mm(row, matrix, out=product)


def _copied(x: Tensor, dtype: torch.dtype, scratch: Scratch, name: str) -> Tensor:
    """In another dtype, in scratch memory; itself if it has that dtype."""
    return x if x.dtype == dtype else scratch.take(name, tuple(x.shape), dtype, x.device).copy_(x)


def expanded(part: Partial, factors: Factors, head_dim: int) -> Partial:
    """Sums of value latents as sums of values: U_v once per query head, and the bias as often as there is weight."""
    up = factors.up.unflatten(0, (-1, head_dim)).transpose(1, 2)[None]
    sums = _wide(per_head(part.sums.to(up.dtype), up))
    if factors.bias is not None:
        bias = factors.bias.view(1, -1, 1, head_dim)
        sums = sums + _wide(per_head(part.total.to(bias.dtype), bias))
    return Partial(part.most, part.total, sums)


def _to_groups(rows: Tensor, groups: int) -> list[Tensor]:
    """(batch, q_heads, new, a) as one (batch, rows, a) for each group of heads."""
    return [part.flatten(1, 2) for part in rows.chunk(groups, dim=1)]

"""The one way into attention, and its backend on any device: torch, which reads latents once, a tile at a time.

The scores of a tile are (rows, tokens), rows being query heads times new tokens:

    keys that are linear in their latents      scores = (U_k^T q) c_k      nothing is rebuilt
    keys that are rotated after rebuilding     scores = q RoPE(U_k c_k)    (tokens, kv_dim) at a time
    values                                     sums += p c_v, and U_v sums once at the end

The longest tensor that a step makes is a tile. Products are computed in the query's dtype, except that float16 is
widened to float32, a tile at a time: absorbed queries, scores and sums of weights all leave its range in real models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention import reference
from cskv.attention.inputs import AttentionInputs, Logits, Rotation, beyond, causal_mask
from cskv.errors import ConfigError
from cskv.factorization.factors import Factors
from cskv.latents.view import Latents, PlainLatents, View
from cskv.scratch import Scratch

BACKENDS = ("triton", "cpu", "torch", "reference")
AUTO = "auto"
MOST_NEW = 64  # tokens: more are cheaper to attend to on rebuilt keys and values
MOST_HEAD_ROWS = 128  # query rows of a kv head: for more, Triton would rebuild keys again every 64 rows
SCORES = 2**19  # numbers in the scores of a tile
REBUILT = 2**21  # numbers in a tile's rebuilt keys, and in its unpacked latents: what was fastest on two cores
LEAST_TILE = 64


def check_backend(backend: str, *others: str) -> None:
    """Raise ConfigError for a name that is none of "auto", `BACKENDS` and `others`."""
    known = (AUTO, *BACKENDS, *others)
    if backend not in known:
        raise ConfigError(f"attention is {backend!r}; expected one of {', '.join(known)}")


def attends_to_latents(new: int, q_heads: int, kv_heads: int) -> bool:
    """Return whether a forward of so many new tokens attends to latents, and not to keys and values rebuilt for it."""
    return new <= MOST_NEW and new * q_heads <= MOST_HEAD_ROWS * kv_heads


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"],
    inputs: AttentionInputs,
    *,
    backend: str = AUTO,
    scratch: Scratch | None = None,
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Attend to sealed tokens by their latents, and to the newest exactly.

    The latents' dtype is the one that is computed in, under autocast too (sums are fp32; the reference computes in fp32
    whatever it is given): it is that of the longest operand. The query, exact tokens and factors are converted to it.

    Args:
        query: after norm and RoPE. Query heads that share a kv head follow one another.
        inputs: what it reads and is told.
        backend: "auto" (Triton on a GPU where it is installed, the compiled kernels on a CPU where they are, else
            torch), "triton" or "cpu" (torch, with a warning, where the kernels cannot do it), "torch" or "reference".
        scratch: scratch tensors to use again from step to step.

    Returns:
        The output of every head, in the query's dtype.

    Raises:
        ConfigError: an unknown backend.
    """
    if backend != AUTO:
        check_backend(backend)
    dtype, view = query.dtype, inputs.view
    if backend == "reference":
        return reference.attention(query, inputs).to(dtype)
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):
            return attention(query, inputs, backend=backend, scratch=scratch)
    computed = dtype if view.k is None else view.k.dtype
    if not computed == dtype == view.keys.dtype == view.values.dtype == inputs.factors.k.up.dtype:
        query, inputs = query.to(computed), inputs.to(computed)
    if backend == "triton" or (backend == AUTO and query.is_cuda):
        from cskv.attention.triton import launch

        if (output := launch.attempt(query, inputs)) is not None:
            return output.to(dtype)
    elif (backend == "cpu" or (backend == AUTO and query.is_cpu)) and not torch.compiler.is_compiling():
        from cskv.attention.cpu import launch as compiled

        scratch = Scratch() if scratch is None else scratch
        if (output := compiled.attempt(query, inputs, scratch, asked=backend == "cpu")) is not None:
            return output if output.dtype == dtype else output.to(dtype)
    if computed == torch.float16:
        query, inputs = query.float(), inputs.to(torch.float32)
    part = exact(query, inputs.view, inputs.logits)
    if view.k is not None and view.v is not None and (length := view.k.length):
        scratch = Scratch() if scratch is None else scratch
        part = part.joined(_sealed(query, inputs, view.k, view.v, length, scratch))
    return part.result(inputs.logits.sinks).to(computed).to(dtype)


class Partial(NamedTuple):
    """Attention over some of the tokens, in fp32; such parts are joined by the log-sum-exp of their logits."""

    most: Float[Tensor, "batch q_heads new 1"]  # the largest logit of every row
    total: Float[Tensor, "batch q_heads new 1"]  # of exp(logit - most): 1 or more, and 0 where a row reads nothing
    sums: Float[Tensor, "batch q_heads new channels"]  # of exp(logit - most) times the value, or its latents

    def joined(self, other: Partial) -> Partial:
        """Join both parts to one. A row's largest logit is finite in one of them at least."""
        most = torch.maximum(self.most, other.most)
        ours, theirs = (self.most - most).exp_(), (other.most - most).exp_()
        return Partial(most, self.total * ours + other.total * theirs, self.sums * ours + other.sums * theirs)

    def result(self, sinks: Float[Tensor, " q_heads"] | None = None) -> Float[Tensor, "batch q_heads new channels"]:
        """Return the weighted mean, once all parts are joined, and 0 where a row reads nothing.

        Sinks are logits that take weight and give nothing.
        """
        if sinks is None:
            return self.sums / self.total.clamp(min=1)
        sink = sinks.to(self.most.dtype)[None, :, None, None]
        return self.joined(Partial(sink, torch.ones_like(sink), torch.zeros_like(sink))).result()


def exact(query: Tensor, view: View, logits: Logits) -> Partial:
    """Attend to the exact branch."""
    keys, values = view.keys, view.values
    hidden: list[Tensor] = []
    if query.dtype == torch.float16:
        query, keys, values = query.float(), keys.float(), values.float()
    if logits.mask is None and query.shape[2] > 1:
        hidden.append(~causal_mask(query.shape[2], keys.shape[2], query.device))
    if view.exists is not None:
        hidden.append(~view.exists[:, None, None])
    products = per_head(query, keys.transpose(2, 3))
    weights, most, total = _weights(products, logits, 0 if logits.mask is None else view.sealed, *hidden)
    return Partial(most, total, per_head(weights.to(values.dtype), values).to(total.dtype))


def _sealed(query: Tensor, inputs: AttentionInputs, k: Latents, v: Latents, length: int, scratch: Scratch) -> Partial:
    """Attend to the compressed branch. Only the number of tiles follows from its length, as torch.compile needs it."""
    factors, rotation, value_heads = inputs.factors, inputs.rotation, inputs.value_heads
    dtype, wide, head_dim = query.dtype, torch.promote_types(query.dtype, torch.float32), query.shape[3]
    absorbed, bias, part = query, None, None
    if rotation is None:
        absorbed = per_head(query, factors.k.up.unflatten(0, (-1, head_dim))[None])
        bias = None if factors.k.bias is None else per_head(query, factors.k.bias.view(1, -1, head_dim, 1))
    tile = _tile(query, inputs, k, v)
    tiles = -(-length // tile)
    for index in range(tiles):
        start, stop = index * tile, None if index == tiles - 1 else (index + 1) * tile
        latents = _converted(k.read(start, stop, scratch), dtype, "latents", scratch)
        if rotation is None:
            products = _by_latents(absorbed, latents, factors.k, scratch)
        else:
            products = _by_keys(query, latents, start, inputs, rotation, scratch)
        products = _converted(products, wide, "scores", scratch)
        if bias is not None:
            products += bias
        if inputs.key_offset is not None:
            products += inputs.key_offset.products(query, start, latents.shape[1])
        hidden = () if k.lengths is None else (beyond(k.lengths, start, start + latents.shape[1]),)
        weights, most, total = _weights(products, inputs.logits, start, *hidden)
        latents = _converted(v.read(start, stop, scratch), dtype, "latents", scratch)
        if value_heads is None:
            sums = _summed(weights, latents, factors.v, scratch)
        else:
            values = value_heads(factors.v.expand(latents))
            sums = per_head(weights.to(values.dtype), values).to(wide)
        of_tile = Partial(most, total, sums)
        part = of_tile if part is None else part.joined(of_tile)
    assert part is not None, "there is at least one tile"
    return part if value_heads is not None else expanded(part, factors.v, head_dim)


def _tile(query: Tensor, inputs: AttentionInputs, k: Latents, v: Latents) -> int:
    """Count the tokens of a tile: the most that keep its scores, and what is rebuilt or unpacked, within bounds.

    Blocks of packed latents are not cut, so that they are unpacked as blocks.
    """
    batch, heads, new, _ = query.shape
    width = 1 if inputs.rotation is None and inputs.value_heads is None else inputs.factors.k.up.shape[0]
    for latents, own in ((k, inputs.factors.k), (v, inputs.factors.v)):
        if not isinstance(latents, PlainLatents):
            width = max(width, 2 * own.down.shape[0])
    tile = min(SCORES // (batch * heads * new), REBUILT // (batch * width))
    step = math.lcm(LEAST_TILE, k.granularity, v.granularity)
    return max(1, tile // step) * step


def _weights(products: Tensor, logits: Logits, start: int, *hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn products with the tokens from `start` on into weights exp(logit - largest), in place but for 16 bits.

    Return them, the largest logit of every row, and the sum of its weights. Logits of minus infinity weigh nothing,
    also where there are no others: the largest is never infinite itself.
    """
    scores = products.to(torch.promote_types(products.dtype, torch.float32)).mul_(logits.scaling)
    if logits.softcap is not None:
        scores.div_(logits.softcap).tanh_().mul_(logits.softcap)
    if logits.mask is not None:
        mask = logits.mask[..., start : start + scores.shape[-1]]
        if mask.dtype == torch.bool:
            hidden = (*hidden, ~mask)
        else:
            scores += mask
    for part in hidden:
        scores.masked_fill_(part, -torch.inf)
    most = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(most).exp_()
    return weights, most, weights.sum(-1, keepdim=True)


def per_head(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply (batch, q_heads, new, a) by the (batch, kv_heads, a, b) of each query head's kv head."""
    batch, heads, new, inner = rows.shape
    grouped = rows.reshape(batch, matrices.shape[1], -1, inner)
    return torch.matmul(grouped, matrices).view(batch, heads, new, -1)


def _by_latents(absorbed: Tensor, latents: Tensor, factors: Factors, scratch: Scratch) -> Tensor:
    """Multiply absorbed queries by latents."""
    rows, groups = absorbed.flatten(1, 2), latents.shape[2] // factors.up.shape[1]
    products = scratch.take("products", (*rows.shape[:2], latents.shape[1]), latents.dtype, latents.device)
    _multiply(rows.chunk(groups, 1), latents.mT.chunk(groups, 1), products.chunk(groups, 1))
    return products.view(*absorbed.shape[:3], -1)


def _by_keys(
    query: Tensor, latents: Tensor, start: int, inputs: AttentionInputs, rotation: Rotation, scratch: Scratch
) -> Tensor:
    """Multiply queries by keys that are rebuilt from latents, and rotated or normalised then."""
    factors = inputs.factors.k
    if inputs.int8_keys is not None:
        keys = rotation.keys(inputs.key_channels(latents, latents.dtype), start).contiguous()
        return per_head(query, keys.transpose(2, 3))
    up, groups = factors.up.T.expand(latents.shape[0], -1, -1), latents.shape[2] // factors.up.shape[1]
    shape = (*latents.shape[:2], up.shape[2])
    channels = scratch.take("channels", shape, latents.dtype, latents.device)
    _multiply(latents.chunk(groups, 2), up.chunk(groups, 2), channels.chunk(groups, 2))
    if factors.bias is not None:
        channels += factors.bias
    cos, sin, by_family = rotation.cos, rotation.sin, not rotation.is_plain or rotation.norm is not None
    if by_family or cos is None or sin is None or torch.compiler.is_compiling():
        keys = rotation.keys(channels, start).contiguous()  # products with strided matrices are many times slower
        return per_head(query, keys.transpose(2, 3))
    heads, stop = channels.unflatten(2, (-1, query.shape[3])).transpose(1, 2), start + latents.shape[1]
    keys = scratch.take("keys", tuple(heads.shape), heads.dtype, heads.device)
    rotate(heads, cos[:, start:stop], sin[:, start:stop], keys)
    return per_head(query, keys.transpose(2, 3))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Rotate (batch, kv_heads, tokens, head_dim) into `out` as a plain `Rotation` does; nothing as large is made.

    Cos and sin are those of the tokens, (batch or 1, tokens, rotary_dim).
    """
    rotary, cos, sin = cos.shape[-1], cos[:, None], sin[:, None]
    half = rotary // 2
    first, second = heads[..., :half], heads[..., half:rotary]
    torch.mul(first, cos[..., :half], out=out[..., :half]).addcmul_(second, sin[..., :half], value=-1)
    torch.mul(second, cos[..., half:], out=out[..., half:rotary]).addcmul_(first, sin[..., half:])
    out[..., rotary:] = heads[..., rotary:]
    return out


def _summed(weights: Tensor, latents: Tensor, factors: Factors, scratch: Scratch) -> Tensor:
    """Sum value latents by weights of a tile."""
    batch, heads, new, _ = weights.shape
    groups = latents.shape[2] // factors.up.shape[1]
    rows = _converted(weights.flatten(1, 2), latents.dtype, "weights", scratch)
    sums = latents.new_empty(batch, heads * new, factors.up.shape[1])
    _multiply(rows.chunk(groups, 1), latents.chunk(groups, 2), sums.chunk(groups, 1))
    return sums.to(weights.dtype).view(batch, heads, new, -1)


def _multiply(rows: Iterable[Tensor], matrices: Iterable[Tensor], out: Iterable[Tensor]) -> None:
    """Multiply, for each head group, (batch, a, b) by (batch, b, c) into (batch, a, c)."""
    for own, others, products in zip(rows, matrices, out, strict=True):
        if not own.is_cpu:
            products.copy_(torch.bmm(own, others))
            continue
        # A batched product would first copy matrices that are not packed together in memory.
        for row, matrix, product in zip(own, others, products, strict=True):
            if torch.compiler.is_compiling():
                product.copy_(torch.mm(row, matrix))
            else:
                torch.mm(row, matrix, out=product)


def _converted(x: Tensor, dtype: torch.dtype, name: str, scratch: Scratch) -> Tensor:
    """Convert a tile's numbers in scratch memory, where they have another dtype."""
    return x if x.dtype == dtype else scratch.take(name, tuple(x.shape), dtype, x.device).copy_(x)


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

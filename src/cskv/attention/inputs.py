"""The inputs of attention beside the query: what it reads, how keys are rotated, and how logits become weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cskv.attention.int8_keys import Int8Keys
from cskv.factorization.factors import LayerFactors
from cskv.latents.view import View

ToHeads = Callable[[Tensor], Tensor]


class RMSNorm(NamedTuple):
    """x * rsqrt(mean of x squared + eps) * weight, over the channels of a head."""

    weight: Float[Tensor, " head_dim"]
    eps: float


@dataclass(frozen=True)
class Rotation:
    """A family's norm and RoPE, from rebuilt key channels to the keys that queries meet.

    Attributes:
        cos, sin: of the sealed tokens, or None where keys are only normalised.
        heads: `heads(channels, cos, sin)`, from (batch, tokens, kv_dim) to (batch, kv_heads, tokens, head_dim), with
            cos and sin of the same tokens.
        is_plain: whether `heads` is x * cos + rotate_half(x) * sin on the first rotary_dim channels of every head,
            after `norm` if there is one, and nothing else, so that a kernel can do it.
        norm: the norm of each head that `is_plain` refers to.
        is_symmetric: whether the halves of cos are equal, and those of sin, so that one of them is enough.
    """

    cos: Float[Tensor, "#batch sealed rotary_dim"] | None
    sin: Float[Tensor, "#batch sealed rotary_dim"] | None
    heads: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    is_plain: bool = False
    norm: RMSNorm | None = None
    is_symmetric: bool = False

    def to(self, dtype: torch.dtype) -> Rotation:
        """Return the same in another dtype."""
        cos, sin = (None if part is None else part.to(dtype) for part in (self.cos, self.sin))
        norm = None if self.norm is None else RMSNorm(self.norm.weight.to(dtype), self.norm.eps)
        return replace(self, cos=cos, sin=sin, norm=norm)

    def keys(
        self, channels: Float[Tensor, "batch tokens kv_dim"], start: int
    ) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
        """Return the keys of sealed tokens from `start` on."""
        stop = start + channels.shape[1]
        cos, sin = (None if part is None else part[:, start:stop] for part in (self.cos, self.sin))
        return self.heads(channels, cos, sin).to(channels.dtype)  # a norm may be in fp32, under autocast


@dataclass(frozen=True)
class KeyOffset:
    """A constant that latents leave out of the keys: the key of sealed token t is the rebuilt one plus R_t constant.

    Attributes:
        rotation: RoPE alone, with cos and sin of the sealed tokens.
        constant: the constant before RoPE.
    """

    rotation: Rotation
    constant: Float[Tensor, " kv_dim"]

    def keys(self, start: int, tokens: int) -> Float[Tensor, "#batch kv_heads tokens head_dim"]:
        """Return the rotated constant of so many tokens from `start` on."""
        batch = 1 if self.rotation.cos is None else self.rotation.cos.shape[0]
        return self.rotation.keys(self.constant.expand(batch, tokens, -1), start)

    def products(
        self, query: Float[Tensor, "batch q_heads new head_dim"], start: int, tokens: int
    ) -> Float[Tensor, "batch q_heads new tokens"]:
        """Return q . R_t constant, unscaled, in fp32 or fp64, of so many tokens from `start` on.

        A plain rotation is linear in cos and sin, so no keys are made: q . R_t b = (q b) . cos_t + (q rotate_half(b)) .
        sin_t over the rotated channels, and q . b over the others.
        """
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        heads = query.shape[1]
        cos, sin = self.rotation.cos, self.rotation.sin
        if not self.rotation.is_plain or cos is None or sin is None:
            keys = self.keys(start, tokens).to(query.dtype)
            return query @ keys.repeat_interleave(heads // keys.shape[1], dim=1).transpose(2, 3)
        rotary, constant = cos.shape[-1], self.constant.to(query.dtype).view(-1, 1, query.shape[3])
        constant = constant.repeat_interleave(heads // constant.shape[0], dim=0)
        turning, rest = constant[..., :rotary], constant[..., rotary:]
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat([turning, -second, first], dim=-1)
        rows = (query[..., :rotary].repeat(1, 1, 1, 2) * turned).flatten(1, 2)
        angles = torch.cat([cos[:, start : start + tokens], sin[:, start : start + tokens]], dim=-1)
        products = (rows @ angles.to(query.dtype).transpose(1, 2)).view(*query.shape[:3], tokens)
        return products + (query[..., rotary:] * rest).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Logits:
    """From products of queries and keys to logits: cap(scaling * q k) + mask, cap(x) = softcap * tanh(x / softcap).

    Attributes:
        scaling: mostly head_dim ** -0.5.
        softcap: None for no capping (Gemma2 has 50).
        mask: the tokens of both branches, the sealed ones first, that a query reads: True where it does, or a number
            that is added. None: every query reads all tokens up to its own, the newest being the queries' own.
        sinks: a further logit per query head that takes weight and gives nothing (GPT-OSS).
    """

    scaling: float
    softcap: float | None = None
    mask: Bool[Tensor, "#batch #q_heads new length"] | Float[Tensor, "#batch #q_heads new length"] | None = None
    sinks: Float[Tensor, " q_heads"] | None = None


@dataclass(frozen=True)
class AttentionInputs:
    """What attention reads and is told, beside the query.

    Attributes:
        view: the cached tokens of both branches.
        factors: the layer's, on the query's device.
        rotation: how rebuilt keys are normalised and rotated. None where they are not, or were before they became
            latents (commuting factors): keys are linear in their latents, and the query absorbs the up-projection.
        logits: scaling, soft-capping, mask and sinks.
        value_heads: from rebuilt channels, (batch, tokens, kv_dim), to values, (batch, kv_heads, tokens, head_dim),
            where a family normalises values. None: values are linear in their latents.
        key_offset: what latents leave out of the keys of sealed tokens; None where they leave out nothing.
        int8_keys: the key factors in 8 bits, where keys that are rotated are rebuilt by those.
    """

    view: View
    factors: LayerFactors
    rotation: Rotation | None
    logits: Logits
    value_heads: ToHeads | None = None
    key_offset: KeyOffset | None = None
    int8_keys: Int8Keys | None = None

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """Return the same in another dtype, but for the latents: they are long, and converted as they are read."""
        view = replace(self.view, keys=self.view.keys.to(dtype), values=self.view.values.to(dtype))
        rotation = None if self.rotation is None else self.rotation.to(dtype)
        return replace(self, view=view, factors=self.factors.to(dtype=dtype), rotation=rotation)

    def key_channels(
        self, latents: Float[Tensor, "batch tokens rank"], dtype: torch.dtype
    ) -> Float[Tensor, "batch tokens kv_dim"]:
        """Rebuild key channels, before norm and RoPE."""
        factors = self.factors.k.to(dtype=dtype)
        if self.int8_keys is None or self.rotation is None:
            return factors.expand(latents.to(dtype))
        channels = self.int8_keys.channels(latents).to(dtype)
        return channels if factors.bias is None else channels + factors.bias


def rebuilt(
    inputs: AttentionInputs, dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "batch kv_heads length head_dim"], Float[Tensor, "batch kv_heads length head_dim"]]:
    """Return the keys and values of all tokens, in the factors' dtype unless another is given, under autocast too."""
    view, factors, rotation = inputs.view, inputs.factors, inputs.rotation
    dtype = factors.k.up.dtype if dtype is None else dtype
    keys, values = view.keys.to(dtype), view.values.to(dtype)
    if view.k is None or view.v is None:
        return keys, values
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        k = inputs.key_channels(view.k.read(), dtype)
        v = factors.v.to(dtype=dtype).expand(view.v.read().to(dtype))
        old_keys = split_heads(k, keys.shape[-1]) if rotation is None else rotation.keys(k, 0)
        if inputs.key_offset is not None:
            old_keys = old_keys + inputs.key_offset.keys(0, old_keys.shape[2])
        old_values = split_heads(v, values.shape[-1]) if inputs.value_heads is None else inputs.value_heads(v)
    return torch.cat([old_keys.to(dtype), keys], dim=2), torch.cat([old_values.to(dtype), values], dim=2)


def split_heads(
    channels: Float[Tensor, "batch tokens kv_dim"], head_dim: int
) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """Return the channels by head, without a copy."""
    return channels.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def causal_mask(new: int, tokens: int, device: torch.device) -> Bool[Tensor, "new tokens"]:
    """Return which of `tokens` exact tokens the queries of the last `new` of them read: those up to their own."""
    return torch.ones(new, tokens, dtype=torch.bool, device=device).tril_(tokens - new)


def beyond(lengths: Int[Tensor, " batch"], start: int, stop: int) -> Bool[Tensor, "batch 1 1 tokens"]:
    """Return which tokens of a range lie past the end of each sequence, to hide them in (batch, heads, new, tokens)."""
    token = torch.arange(start, stop, device=lengths.device)
    return (token >= lengths[:, None])[:, None, None]

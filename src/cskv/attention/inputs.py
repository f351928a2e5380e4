"""The inputs of attention beside the query: what it reads, how keys are rotated, and how logits become weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cskv.factorization.factors import LayerFactors
from cskv.latents.view import View

ToHeads = Callable[[Tensor], Tensor]


class RMSNorm(NamedTuple):
    """x * rsqrt(mean of x squared + eps) * weight, over the channels of a head."""

    weight: Float[Tensor, " head_dim"]
    eps: float


@dataclass(frozen=True)
class Rotation:
    """From rebuilt key channels to the keys that queries meet: a family's norm and RoPE.

    Attributes:
        cos, sin: of the sealed tokens, or None where keys are only normalised.
        heads: `heads(channels, cos, sin)`, from (batch, tokens, kv_dim) to (batch, kv_heads, tokens, head_dim), with
            cos and sin of the same tokens.
        is_plain: whether `heads` is x * cos + rotate_half(x) * sin on the first rotary_dim channels of every head,
            after `norm` if there is one, and nothing else, so that a kernel can do it.
        norm: see there.
    """

    cos: Float[Tensor, "#batch sealed rotary_dim"] | None
    sin: Float[Tensor, "#batch sealed rotary_dim"] | None
    heads: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    is_plain: bool = False
    norm: RMSNorm | None = None

    def keys(
        self, channels: Float[Tensor, "batch tokens kv_dim"], start: int
    ) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
        """The keys of sealed tokens from `start` on."""
        stop = start + channels.shape[1]
        cos, sin = (None if part is None else part[:, start:stop] for part in (self.cos, self.sin))
        return self.heads(channels, cos, sin)

    def rotated(
        self,
        heads: Float[Tensor, "batch kv_heads tokens head_dim"],
        start: int,
        out: Float[Tensor, "batch kv_heads tokens head_dim"],
    ) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
        """The plain rotation alone, of sealed tokens from `start` on, into `out`, without a tensor as large."""
        if self.cos is None or self.sin is None:
            raise ValueError("there is no rotation")
        rotary, stop = self.cos.shape[-1], start + heads.shape[2]
        half = rotary // 2
        cos, sin = self.cos[:, None, start:stop], self.sin[:, None, start:stop]
        first, second = heads[..., :half], heads[..., half:rotary]
        if torch.compiler.is_compiling():  # it fuses this, and cannot trace products written into a part of a tensor
            turned = (
                first * cos[..., :half] - second * sin[..., :half],
                second * cos[..., half:] + first * sin[..., half:],
            )
            return torch.cat([*turned, heads[..., rotary:]], dim=-1)
        torch.mul(first, cos[..., :half], out=out[..., :half]).addcmul_(second, sin[..., :half], value=-1)
        torch.mul(second, cos[..., half:], out=out[..., half:rotary]).addcmul_(first, sin[..., half:])
        out[..., rotary:] = heads[..., rotary:]
        return out


@dataclass(frozen=True)
class Logits:
    """From products of queries and keys to logits: cap(scaling * q k) + mask, cap(x) = softcap * tanh(x / softcap).

    Attributes:
        scaling: mostly head_dim ** -0.5.
        softcap: None for no capping (Gemma2 has 50).
        mask: which tokens of both branches, the sealed ones first, a query reads: True where it does, or a number that
            is added. None lets every query read all tokens up to its own, the newest being the queries' own.
        sinks: a further logit per query head that takes weight and gives nothing (GPT-OSS).
    """

    scaling: float
    softcap: float | None = None
    mask: Bool[Tensor, "#batch #q_heads new length"] | Float[Tensor, "#batch #q_heads new length"] | None = None
    sinks: Float[Tensor, " q_heads"] | None = None

    def of(
        self, products: Float[Tensor, "batch q_heads new tokens"], start: int
    ) -> Float[Tensor, "batch q_heads new tokens"]:
        """Turn products into the logits of the tokens from `start` on: in place, but for 16 bits, which become fp32.

        A mask that is None is not applied.
        """
        products = products.to(torch.promote_types(products.dtype, torch.float32))
        products *= self.scaling
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.mask is not None:
            mask = self.mask[..., start : start + products.shape[-1]]
            if mask.dtype == torch.bool:
                products.masked_fill_(~mask, -torch.inf)
            else:
                products += mask
        return products


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
    """

    view: View
    factors: LayerFactors
    rotation: Rotation | None
    logits: Logits
    value_heads: ToHeads | None = None

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """Return the same in another dtype, but for the latents: they are long, and converted as they are read."""
        view, rotation, norm = self.view, self.rotation, None if self.rotation is None else self.rotation.norm
        if norm is not None:
            norm = RMSNorm(norm.weight.to(dtype), norm.eps)
        if rotation is not None and rotation.cos is not None and rotation.sin is not None:
            rotation = replace(rotation, cos=rotation.cos.to(dtype), sin=rotation.sin.to(dtype), norm=norm)
        view = replace(view, keys=view.keys.to(dtype), values=view.values.to(dtype))
        return replace(self, view=view, factors=self.factors.to(dtype=dtype), rotation=rotation)


def split_heads(
    channels: Float[Tensor, "batch tokens kv_dim"], head_dim: int
) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """Return the channels by head, without a copy."""
    return channels.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def causal_mask(new: int, tokens: int, device: torch.device) -> Bool[Tensor, "new tokens"]:
    """Which of `tokens` exact tokens the queries of the last `new` of them read: those up to their own."""
    return torch.ones(new, tokens, dtype=torch.bool, device=device).tril_(tokens - new)


def beyond(lengths: Int[Tensor, " batch"], start: int, stop: int) -> Bool[Tensor, "batch 1 1 tokens"]:
    """Which tokens of a range lie past the end of each sequence, to hide them in (batch, heads, new, tokens)."""
    token = torch.arange(start, stop, device=lengths.device)
    return (token >= lengths[:, None])[:, None, None]

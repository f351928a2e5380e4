"""Attention in plain words: every key and value is rebuilt in fp32 and one softmax is taken over all of them.

The truth that the fast paths are tested against, and nothing that anyone should generate with.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.inputs import Logits, Rotation, ToHeads, beyond, causal_mask
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.view import Latents, View


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"],
    view: View,
    factors: LayerFactors,
    rope: Rotation | None,
    logits: Logits,
    value_heads: ToHeads | None = None,
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """What `cskv.attention.dispatch.attention` computes. The result is fp32, or fp64 for fp64 queries."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = view.keys.to(dtype), view.values.to(dtype)
    if view.k is not None and view.v is not None:
        channels = _channels(view.k, factors.k, dtype)
        sealed = _heads(channels, keys) if rope is None else rope.keys(channels, 0)
        keys = torch.cat([sealed.to(dtype), keys], dim=2)
        channels = _channels(view.v, factors.v, dtype)
        sealed = _heads(channels, values) if value_heads is None else value_heads(channels)
        values = torch.cat([sealed.to(dtype), values], dim=2)
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))
    scores = logits.of(query.to(dtype) @ keys.transpose(2, 3), 0)
    if logits.mask is None:
        reads = causal_mask(query.shape[2], keys.shape[2], query.device)
        scores = scores.masked_fill(~reads, torch.finfo(dtype).min)
    if view.k is not None and view.k.lengths is not None:
        hidden = beyond(view.k.lengths, 0, view.sealed)
        scores[..., : view.sealed] = scores[..., : view.sealed].masked_fill(hidden, torch.finfo(dtype).min)
    if view.exists is not None:
        recent = scores[..., view.sealed :]
        scores[..., view.sealed :] = recent.masked_fill(~view.exists[:, None, None], torch.finfo(dtype).min)
    if logits.sinks is not None:
        sinks = logits.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return torch.softmax(scores, dim=-1)[..., : values.shape[2]] @ values


def _channels(latents: Latents, factors: Factors, dtype: torch.dtype) -> Tensor:
    return factors.to(dtype=dtype).expand(latents.read().to(dtype))


def _heads(channels: Tensor, like: Tensor) -> Tensor:
    return channels.unflatten(-1, (-1, like.shape[-1])).transpose(1, 2)

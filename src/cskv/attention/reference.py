"""Attention in plain words: every key and value is rebuilt in fp32 and one softmax is taken over all of them.

The truth that the fast paths are tested against, and nothing that anyone should generate with.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.inputs import AttentionInputs, Logits, beyond, causal_mask, rebuilt


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"], inputs: AttentionInputs
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Compute `cskv.attention.attend.attention` in fp32, or in fp64 for fp64 queries."""
    view = inputs.view
    keys, values = rebuilt(inputs, torch.promote_types(query.dtype, torch.float32))
    exists = torch.ones(view.keys.shape[0], 1, 1, view.length, dtype=torch.bool, device=query.device)
    if view.k is not None and view.k.lengths is not None:
        exists[..., : view.sealed] = ~beyond(view.k.lengths, 0, view.sealed)
    if view.exists is not None:
        exists[..., view.sealed :] = view.exists[:, None, None]
    return over(query, keys, values, inputs.logits, exists)


def over(
    query: Float[Tensor, "batch q_heads new head_dim"],
    keys: Float[Tensor, "batch kv_heads length head_dim"],
    values: Float[Tensor, "batch kv_heads length head_dim"],
    logits: Logits,
    exists: Tensor | None = None,
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Attend to keys and values that are there in full, in fp32, or in fp64 for fp64 queries.

    Args:
        query, keys, values: as attention has them, after norm and RoPE.
        logits: scaling, soft-capping, mask and sinks.
        exists: which tokens there are, (batch, 1, 1, length), where sequences differ.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (part.to(dtype).repeat_interleave(repeats, dim=1) for part in (keys, values))
    with torch.autocast(query.device.type, enabled=False):
        scores = logits.scaling * (query.to(dtype) @ keys.transpose(2, 3))
        if logits.softcap is not None:
            scores = logits.softcap * torch.tanh(scores / logits.softcap)
        mask = causal_mask(query.shape[2], keys.shape[2], query.device) if logits.mask is None else logits.mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if exists is not None:
            scores = scores.masked_fill(~exists, -torch.inf)
        if logits.sinks is not None:
            sinks = logits.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        reads_nothing = scores.isneginf().all(-1, keepdim=True)
        weights = torch.softmax(scores, dim=-1).masked_fill(reads_nothing, 0)
        return weights[..., : values.shape[2]] @ values

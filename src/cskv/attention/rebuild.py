"""Keys and values of all tokens in full: old ones rebuilt from their latents, joined with the exact branch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.inputs import AttentionInputs, split_heads

MOST_NEW = 64  # tokens: more are cheaper to attend to on rebuilt keys and values
MOST_HEAD_ROWS = 128  # query rows of a kv head: for more, Triton would rebuild keys again every 64 rows


def attends_to_latents(new: int, q_heads: int, kv_heads: int) -> bool:
    """Return whether a forward of so many new tokens attends to latents, and not to keys and values rebuilt for it."""
    return new <= MOST_NEW and new * q_heads <= MOST_HEAD_ROWS * kv_heads


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
        k = factors.k.to(dtype=dtype).expand(view.k.read().to(dtype))
        v = factors.v.to(dtype=dtype).expand(view.v.read().to(dtype))
        old_keys = split_heads(k, keys.shape[-1]) if rotation is None else rotation.keys(k, 0)
        if inputs.key_offset is not None:
            old_keys = old_keys + inputs.key_offset.keys(0, old_keys.shape[2])
        old_values = split_heads(v, values.shape[-1]) if inputs.value_heads is None else inputs.value_heads(v)
    return torch.cat([old_keys.to(dtype), keys], dim=2), torch.cat([old_values.to(dtype), values], dim=2)

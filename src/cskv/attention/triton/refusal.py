"""What the Triton kernels cannot do, and say so of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.attend import attends_to_latents
from cskv.attention.inputs import AttentionInputs
from cskv.attention.triton.plan import MOST_KEPT
from cskv.factorization.factors import LayerFactors
from cskv.latents.pages import PagedLatents
from cskv.latents.view import Latents
from cskv.quantization.dispatch import installed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(query: Float[Tensor, "batch q_heads new head_dim"], inputs: AttentionInputs) -> str | None:
    """Return why the kernels cannot do this; None where they can."""
    view, factors, rope = inputs.view, inputs.factors, inputs.rotation
    if not installed():
        return "triton is not installed"
    reason = _device_refusal(query.device)
    if reason is not None or view.k is None or view.v is None:
        return reason
    if inputs.value_heads is not None:
        return "its kernels do not normalise values"
    if rope is not None and (not rope.is_plain or rope.cos is None or rope.sin is None):
        return "its kernels normalise keys by head and rotate them by halves, and do nothing else to them"
    if rope is not None and rope.cos is not None and (query.shape[3] % 2 or rope.cos.shape[-1] % 2):
        return f"its kernels rotate pairs of channels, and got {rope.cos.shape[-1]} of {query.shape[3]}"
    if not attends_to_latents(query.shape[2], query.shape[1], view.keys.shape[1]):
        return f"{query.shape[2]} new tokens are too many, as in a prefill: rebuild keys and values for them"
    if inputs.key_offset is not None and inputs.logits.softcap is not None:
        return "its kernels cap logits before they add what keys leave out"
    if factors.k.groups != factors.v.groups:
        return f"its kernels share a tile of tokens: {factors.k.groups} groups of keys, {factors.v.groups} of values"
    if inputs.int8_keys is not None and rope is not None and factors.k.rank // factors.k.groups > MOST_KEPT:
        return f"its kernels rebuild keys in 8 bits from at most {MOST_KEPT} latents of a group"
    if not _same_pages(view.k, view.v):
        return "its kernels find keys and values by one table of pages"
    return _dtype_refusal(query, view.k, view.v, factors)


def _device_refusal(device: torch.device) -> str | None:
    from cskv.attention.triton import tiles

    if tiles.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"its kernels need a GPU, and the query is on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or newer"
    return None


def _dtype_refusal(query: Tensor, k: Latents, v: Latents, factors: LayerFactors) -> str | None:
    if query.dtype not in DTYPES:
        return f"its kernels compute in 16 or 32 bits, and the query is {query.dtype}"
    for latents, up in ((k, factors.k.up), (v, factors.v.up)):
        if not latents.dtype == up.dtype == query.dtype:
            return f"queries, factors and latents differ in dtype: {query.dtype}, {up.dtype} and {latents.dtype}"
    return None


def _same_pages(k: Latents, v: Latents) -> bool:
    """Return whether a token's keys and values are found by the same entry of a table, or neither by any."""
    if not isinstance(k, PagedLatents) or not isinstance(v, PagedLatents):
        return not isinstance(k, PagedLatents) and not isinstance(v, PagedLatents)
    return k.table is v.table and k.lengths is v.lengths and k.pages.block_size == v.pages.block_size

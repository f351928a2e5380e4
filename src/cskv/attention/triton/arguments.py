"""Tensors, strides and constants of the Triton kernels, from the inputs of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cskv.attention.attend import per_head
from cskv.attention.inputs import Rotation
from cskv.attention.triton.plan import padded
from cskv.factorization.factors import Factors
from cskv.latents.pages import PagedLatents, Pages
from cskv.latents.view import Latents, PackedLatents, PlainLatents
from cskv.quantization.tables import channel_table, most_planes


def keys_arguments(query: Tensor, factors: Factors, rope: Rotation | None) -> dict[str, Any]:
    """Return the query, absorbed or as it is, and what rebuilds keys."""
    head_dim, bias = query.shape[3], factors.bias
    scale: Tensor | None = None
    of_query: Tensor | None = None
    up, cos, sin, norm = None, None, None, None
    if rope is None:
        if bias is not None:
            of_query = per_head(query.float(), bias.float().view(1, -1, head_dim, 1)).contiguous()
        query, scale = _absorbed(query, factors.up.unflatten(0, (-1, head_dim))[None])
    else:
        up, norm = _aligned(factors.up), rope.norm
        cos, sin = (_by_sequence(part, query.shape[0]) for part in (rope.cos, rope.sin))
    rows = _rows_contiguous(query.flatten(1, 2))
    return {
        "query": rows,
        "query_scale": scale,
        "query_bias": of_query,
        "up": up,
        "key_bias": None if rope is None or bias is None else bias.contiguous(),
        "cos": cos,
        "sin": sin,
        "key_norm": norm.weight.contiguous() if norm is not None else None,
        "norm_eps": norm.eps if norm is not None else 0.0,
        "query_batch": rows.stride(0),
        "query_row": rows.stride(1),
        "up_row": 0 if up is None else up.stride(0),
        "cos_batch": 0 if cos is None else cos.stride(0),
        "cos_token": 0 if cos is None else cos.stride(1),
        "sin_batch": 0 if sin is None else sin.stride(0),
        "sin_token": 0 if sin is None else sin.stride(1),
        "ROTATED": rope is not None,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": 0 if cos is None else cos.shape[-1],
        "HALF": padded(head_dim // 2),
        "HAS_SCALE": scale is not None,
        "HAS_BIAS": bias is not None,
        "HAS_NORM": norm is not None,
    }


def _absorbed(query: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return U_k^T q, in float16 as rows of at most 1 and what they were divided by: they may be out of its range."""
    if query.dtype != torch.float16:
        return per_head(query, up), None
    wide = per_head(query.float(), up.float())
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float16).tiny)
    return (wide / scale).half(), scale.contiguous()


def mask_arguments(mask: Tensor | None, query: Tensor, sealed: int) -> dict[str, Any]:
    """Return the sealed tokens' mask, with strides of 0 where it is broadcast. None: all queries read all tokens."""
    strides: tuple[int, ...] = (0, 0, 0, 0)
    kind = 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask[..., :sealed].expand(*query.shape[:3], sealed)
        strides = mask.stride()
        mask = mask.view(torch.uint8) if kind == 1 else mask
    names = ("mask_batch", "mask_head", "mask_new", "mask_token")
    return {"mask": mask, "MASK": kind, **dict(zip(names, strides, strict=True))}


def page_arguments(latents: Latents) -> dict[str, Any]:
    """Return the tokens of every request and the pages that they lie in; nothing for latents that are not in pages."""
    if not isinstance(latents, PagedLatents):
        return {"page_table": None, "lengths": None, "page_row": None, "PAGE": 0}
    table = _rows_contiguous(latents.table)
    return {
        "page_table": table,
        "lengths": latents.lengths.contiguous(),
        "page_row": table.stride(0),
        "PAGE": latents.pages.block_size,
    }


def store_arguments(name: str, latents: Latents) -> dict[str, Any]:
    """Return the latents of "k" or "v". The strides of a batch are those of pages where latents lie in pages."""
    packed: PackedLatents | Pages | None = None
    rows: Tensor | None = None
    if isinstance(latents, PlainLatents):
        data = latents.tokens
    elif isinstance(latents, PagedLatents):
        data, packed = latents.pages.data, latents.pages if latents.pages.grid is not None else None
    else:
        assert isinstance(latents, PackedLatents), "refused otherwise"
        data, packed, rows = latents.payload, latents, latents.token_block
    data = _rows_contiguous(data)
    scales, minima, table, planes, block_tokens = None, None, None, 0, 1
    if packed is not None:
        grid = packed.grid
        assert grid is not None, "packed latents have all"
        assert packed.scales is not None, "packed latents have all"
        assert packed.minima is not None, "packed latents have all"
        scales, minima = _rows_contiguous(packed.scales), _rows_contiguous(packed.minima)
        if scales.stride() != minima.stride():
            scales, minima = scales.contiguous(), minima.contiguous()
        table, planes, block_tokens = channel_table(grid, data.device), most_planes(grid), grid.block_tokens
    upper = name.upper()
    return {
        f"{name}_data": data,
        f"{name}_batch": data.stride(0),
        f"{name}_token": data.stride(1),
        f"{name}_scales": scales,
        f"{name}_minima": minima,
        f"{name}_rows": rows,
        f"{name}_table": table,
        f"{name}_parameter_batch": 0 if scales is None else scales.stride(0),
        f"{name}_parameter_row": 0 if scales is None else scales.stride(1),
        f"{upper}_PLANES": planes,
        f"{upper}_BLOCK_TOKENS": block_tokens,
        f"{upper}_HAS_ROWS": rows is not None,
    }


def arithmetic_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """Return the dtype and precision of the products: fp32 goes without TF32."""
    import triton.language as tl

    from cskv.attention.triton import kernels

    return {
        "ELEMENT": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype],
        "EMULATED": kernels.INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _rows_contiguous(part: Tensor) -> Tensor:
    """Make the last dimension contiguous, as the kernels take it to be."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _aligned(up: Tensor) -> Tensor:
    """Start rows at multiples of 16 bytes, so that they can be loaded 16 bytes at a time."""
    if up.stride(1) == 1 and up.stride(0) * up.element_size() % 16 == 0:
        return up  # as the layer's factors are on a GPU: nothing is copied in a step
    missing = -up.shape[1] % (16 // up.element_size())
    return torch.nn.functional.pad(up, (0, missing)) if missing else _rows_contiguous(up)


def _by_sequence(part: Tensor | None, batch: int) -> Tensor:
    assert part is not None, "refused otherwise"
    return _rows_contiguous(part).expand(batch, -1, -1)

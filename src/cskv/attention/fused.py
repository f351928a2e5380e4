"""Attention on the compressed cache with Triton kernels: the compressed branch, in one pass over packed or plain latents.

The kernels give every range of tokens as a partial in latents, and join those. U_v, the exact branch and the sinks
follow with torch, as in `cskv.attention.tiled`: they are small. Nothing here waits for the device, and sizes follow from
shapes alone, so a step can be captured in a CUDA graph after a first call outside of it (kernels are compiled, and
tables of grids copied, when they are first used).

There is no autotuning: it would time kernels in the middle of a step. `cskv.attention.plan` has fixed choices, and a
plan that a device has too little shared memory for is made smaller once and remembered.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.partial import Partial
from cskv.attention.plan import Plan, Shapes, padded, plan, smaller
from cskv.attention.rules import Logits, Rope, ToHeads
from cskv.attention.tiled import Summed, exact, per_head
from cskv.factorization.factors import Factors, LayerFactors
from cskv.quantization.tables import channel_table, most_planes
from cskv.view import Latents, PackedLatents, PlainLatents, View

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD_ROWS = 128  # beyond that keys would be rebuilt for every 64 rows again, where torch rebuilds them once
JOIN_STEP, JOIN_BLOCK = 64, 64
INTERPRETED_MULTIPROCESSORS = 2

_fitting: dict[Plan, Plan] = {}  # of plans that needed too much shared memory, the ones that did not


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"],
    view: View,
    factors: LayerFactors,
    rope: Rope | None,
    logits: Logits,
    value_heads: ToHeads | None = None,
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """What `cskv.attention.dispatch.attention` computes, in the query's dtype with sums in fp32.

    `refusal` has to be None for the same arguments, so `value_heads` is too.
    """
    part = exact(query, view, logits)
    if view.k is not None and view.v is not None:
        sealed = _sealed(query, view.k, view.v, factors, rope, logits)
        part = part.joined(Summed(query, factors.v).expanded(sealed))
    return part.result(logits.sinks).to(query.dtype)


def refusal(
    query: Float[Tensor, "batch q_heads new head_dim"],
    view: View,
    factors: LayerFactors,
    rope: Rope | None,
    logits: Logits,
    value_heads: ToHeads | None = None,
) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    if not _installed():
        return "triton is not installed"
    reason = _device_refusal(query.device)
    if reason is not None or view.k is None or view.v is None:
        return reason
    if value_heads is not None:
        return "its kernels do not normalise values"
    if rope is not None and (not rope.is_plain or rope.cos is None or rope.sin is None):
        return "its kernels rotate keys, and do nothing else to them"
    if rope is not None and rope.cos is not None and (query.shape[3] % 2 or rope.cos.shape[-1] % 2):
        return f"its kernels rotate pairs of channels, and got {rope.cos.shape[-1]} of {query.shape[3]}"
    head_rows = query.shape[2] * query.shape[1] // view.keys.shape[1]
    if head_rows > MOST_HEAD_ROWS:
        return f"new tokens times query heads are more than {MOST_HEAD_ROWS} per kv head, as in a prefill"
    if factors.k.groups != factors.v.groups:
        return f"its kernels share a tile of tokens: {factors.k.groups} groups of keys, {factors.v.groups} of values"
    return _dtype_refusal(query, view.k, view.v, factors)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _device_refusal(device: torch.device) -> str | None:
    from cskv.attention import kernels

    if kernels.INTERPRETED:
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
        if not isinstance(latents, PlainLatents | PackedLatents):
            return f"its kernels cannot read {type(latents).__name__}"
        dtype = latents.dtype if isinstance(latents, PackedLatents) else latents.tokens.dtype
        if not dtype == up.dtype == query.dtype:
            return f"queries, factors and latents differ in dtype: {query.dtype}, {up.dtype} and {dtype}"
    return None


def _sealed(query: Tensor, k: Latents, v: Latents, factors: LayerFactors, rope: Rope | None, logits: Logits) -> Partial:
    """The compressed branch, with sums in latents."""
    batch, q_heads, new, head_dim = query.shape
    groups, kv_heads = factors.k.groups, factors.k.kv_dim // head_dim
    shapes = Shapes(
        batch=batch,
        groups=groups,
        rows=q_heads // groups * new,
        head_rows=q_heads // kv_heads * new,
        tokens=k.length,
        key_rank=k.rank // groups,
        value_rank=v.rank // groups,
        rotated=rope is not None,
        packed=isinstance(k, PackedLatents) or isinstance(v, PackedLatents),
        itemsize=query.element_size(),
    )
    chosen = plan(shapes, _multiprocessors(query.device))
    arguments = {
        **_keys(query, factors.k, rope),
        **_mask(logits.mask, query, k.length),
        **_store("k", k),
        **_store("v", v),
        "scaling": logits.scaling,
        "softcap": logits.softcap or 1.0,
        "HAS_SOFTCAP": logits.softcap is not None,
    }
    parts = _fitted(chosen, shapes, query, arguments)
    return Partial(*(part.view(batch, q_heads, new, -1) for part in _joined(*parts)))


def _fitted(chosen: Plan, shapes: Shapes, query: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The partials of all splits, by the first plan that the device has room for."""
    from triton.runtime.errors import OutOfResources

    current = _fitting.get(chosen, chosen)
    while True:
        try:
            return _partials(current, shapes, query, arguments)
        except OutOfResources:
            less = smaller(current, shapes.tokens)
            if less is None:
                raise
            current = _fitting[chosen] = less


def _partials(chosen: Plan, shapes: Shapes, query: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    from cskv.attention import kernels

    lines = shapes.batch * shapes.groups * shapes.rows
    most, total = (query.new_empty(chosen.splits, lines, dtype=torch.float32) for _ in range(2))
    sums = query.new_empty(chosen.splits, lines, shapes.value_rank, dtype=torch.float32)
    value_blocks = -(-shapes.value_rank // chosen.value_block)
    kernels.partials[(chosen.row_blocks * value_blocks, chosen.splits, shapes.batch * shapes.groups)](
        **arguments,
        most_out=most,
        total_out=total,
        sums_out=sums,
        tokens=shapes.tokens,
        split_tokens=chosen.split_tokens,
        lines=lines,
        groups=shapes.groups,
        rows=shapes.rows,
        new=query.shape[2],
        head_rows=shapes.head_rows,
        block_rows=chosen.block_rows,
        row_blocks=chosen.row_blocks,
        key_rank=shapes.key_rank,
        value_rank=shapes.value_rank,
        ROWS=padded(chosen.block_rows),
        TILE=chosen.tile,
        KEY_BLOCK=chosen.key_block,
        KEY_BLOCKS=-(-shapes.key_rank // chosen.key_block),
        VALUE_BLOCK=chosen.value_block,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        **_arithmetic(query.dtype),
    )
    return most, total, sums


def _joined(most: Tensor, total: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The partials of all splits, (splits, lines[, rank]), as one."""
    from cskv.attention import kernels

    splits, lines, rank = sums.shape
    if splits == 1:
        return most, total, sums
    out = torch.empty_like(most[0]), torch.empty_like(total[0]), torch.empty_like(sums[0])
    grid = (lines, -(-rank // JOIN_BLOCK))
    kernels.join[grid](most, total, sums, *out, splits, lines, rank, STEP=JOIN_STEP, BLOCK=JOIN_BLOCK)
    return out


def _keys(query: Tensor, factors: Factors, rope: Rope | None) -> dict[str, Any]:
    """The query, absorbed or as it is, and what rebuilds keys."""
    head_dim, bias = query.shape[3], factors.bias
    of_query: Tensor | None = None
    up, cos, sin = None, None, None
    if rope is None:
        if bias is not None:
            of_query = per_head(query, bias.view(1, -1, head_dim, 1)).float().contiguous()
        query = per_head(query, factors.up.unflatten(0, (-1, head_dim))[None])
    else:
        up = _aligned(factors.up)
        cos, sin = (_by_sequence(part, query.shape[0]) for part in (rope.cos, rope.sin))
    rows = _rows_contiguous(query.flatten(1, 2))
    return {
        "query": rows,
        "query_bias": of_query,
        "up": up,
        "key_bias": None if rope is None or bias is None else bias.contiguous(),
        "cos": cos,
        "sin": sin,
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
        "HAS_BIAS": bias is not None,
    }


def _mask(mask: Tensor | None, query: Tensor, sealed: int) -> dict[str, Any]:
    """The sealed tokens' mask; strides of 0 for what it is broadcast over. None lets all queries read all of them."""
    strides, kind = (0, 0, 0, 0), 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask[..., :sealed].expand(*query.shape[:3], sealed)
        strides = mask.stride()
        mask = mask.view(torch.uint8) if kind == 1 else mask
    names = ("mask_batch", "mask_head", "mask_new", "mask_token")
    return {"mask": mask, "MASK": kind, **dict(zip(names, strides, strict=True))}


class _Store(NamedTuple):
    """Latents as the kernels take them."""

    data: Tensor
    batch: int
    token: int
    scales: Tensor | None = None
    minima: Tensor | None = None
    rows: Tensor | None = None
    table: Tensor | None = None
    parameter_batch: int = 0
    parameter_row: int = 0
    planes: int = 0
    block_tokens: int = 1

    @classmethod
    def of(cls, latents: Latents) -> _Store:
        if isinstance(latents, PlainLatents):
            tokens = _rows_contiguous(latents.tokens)
            return cls(tokens, tokens.stride(0), tokens.stride(1))
        assert isinstance(latents, PackedLatents), "refused otherwise"
        payload, scales, minima = (_rows_contiguous(x) for x in (latents.payload, latents.scales, latents.minima))
        if scales.stride() != minima.stride():
            scales, minima = scales.contiguous(), minima.contiguous()
        grid = latents.grid
        return cls(
            payload, payload.stride(0), payload.stride(1), scales, minima, latents.token_block,
            channel_table(grid, payload.device), scales.stride(0), scales.stride(1), most_planes(grid),
            grid.block_tokens,
        )  # fmt: skip


def _store(name: str, latents: Latents) -> dict[str, Any]:
    store = _Store.of(latents)
    upper = name.upper()
    return {
        **{f"{name}_{field}": getattr(store, field) for field in _Store._fields if field not in _CONSTANT},
        f"{upper}_PLANES": store.planes,
        f"{upper}_BLOCK_TOKENS": store.block_tokens,
        f"{upper}_HAS_ROWS": store.rows is not None,
    }


_CONSTANT = ("planes", "block_tokens")


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """In what the products are computed: the dtype, and fp32 without TF32."""
    import triton.language as tl

    from cskv.attention import kernels

    return {
        "ELEMENT": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype],
        "EMULATED": kernels.INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _rows_contiguous(part: Tensor) -> Tensor:
    """With the last dimension contiguous, as the kernels take it to be."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _aligned(up: Tensor) -> Tensor:
    """With rows that start at multiples of 16 bytes, so that they can be loaded 16 bytes at a time."""
    missing = -up.shape[1] % (16 // up.element_size())
    return torch.nn.functional.pad(up, (0, missing)) if missing else _rows_contiguous(up)


def _by_sequence(part: Tensor | None, batch: int) -> Tensor:
    assert part is not None, "refused otherwise"
    return _rows_contiguous(part).expand(batch, -1, -1)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)



"""Attention on the compressed cache with Triton kernels: its compressed branch, in one pass over the latents.

The kernels give every range of tokens as a partial in latents, and join those. U_v, the exact branch and the sinks
follow with torch, as in `cskv.attention.attend`: they are small. Nothing here waits for the device, and sizes follow
from shapes alone (of latents in pages, from the bound on their lengths that the host knows), so a step can be captured
in a CUDA graph after a first call outside of it (kernels are compiled, and tables of grids copied, when they are first
used).

There is no autotuning: it would time kernels in the middle of a step. The choices of `plan` are fixed, and a plan that
a device has too little shared memory for is made smaller once and remembered.
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.attend import Partial, attends_to_latents, exact, expanded
from cskv.attention.inputs import AttentionInputs
from cskv.attention.triton.arguments import (
    arithmetic_arguments,
    keys_arguments,
    mask_arguments,
    page_arguments,
    store_arguments,
)
from cskv.attention.triton.plan import Plan, Shapes, padded, plan, smaller
from cskv.factorization.factors import LayerFactors
from cskv.latents.pages import PagedLatents
from cskv.latents.view import Latents, PackedLatents
from cskv.quantization.dispatch import installed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
JOIN_STEP, JOIN_BLOCK = 64, 64
INTERPRETED_MULTIPROCESSORS = 2

_fitting: dict[Plan, Plan] = {}  # of plans that needed too much shared memory, the ones that did not


def attempt(
    query: Float[Tensor, "batch q_heads new head_dim"], inputs: AttentionInputs
) -> Float[Tensor, "batch q_heads new head_dim"] | None:
    """Compute `attention` where the kernels can; else say once why not, and return None."""
    reason = refusal(query, inputs)
    if reason is None:
        return attention(query, inputs)
    _say_once(reason)
    return None


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"attention on the compressed cache by torch, not triton: {reason}", stacklevel=4)


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"], inputs: AttentionInputs
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Compute `cskv.attention.attend.attention` in the query's dtype with sums in fp32.

    `refusal` has to be None for the same arguments.
    """
    view = inputs.view
    part = exact(query, view, inputs.logits)
    if view.k is not None and view.v is not None and view.sealed:
        sealed = _sealed(query, view.k, view.v, inputs)
        part = part.joined(expanded(sealed, inputs.factors.v, query.shape[3]))
    return part.result(inputs.logits.sinks).to(query.dtype)


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
    if not _same_pages(view.k, view.v):
        return "its kernels find keys and values by one table of pages"
    return _dtype_refusal(query, view.k, view.v, factors)


def _device_refusal(device: torch.device) -> str | None:
    from cskv.attention.triton import kernels

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
        if not latents.dtype == up.dtype == query.dtype:
            return f"queries, factors and latents differ in dtype: {query.dtype}, {up.dtype} and {latents.dtype}"
    return None


def _same_pages(k: Latents, v: Latents) -> bool:
    """Return whether a token's keys and values are found by the same entry of a table, or neither by any."""
    if not isinstance(k, PagedLatents) or not isinstance(v, PagedLatents):
        return not isinstance(k, PagedLatents) and not isinstance(v, PagedLatents)
    return k.table is v.table and k.lengths is v.lengths and k.pages.block_size == v.pages.block_size


def _is_packed(latents: Latents) -> bool:
    return latents.pages.grid is not None if isinstance(latents, PagedLatents) else isinstance(latents, PackedLatents)


def _sealed(query: Tensor, k: Latents, v: Latents, inputs: AttentionInputs) -> Partial:
    """Attend to the compressed branch, with sums in latents."""
    factors, rope, logits = inputs.factors, inputs.rotation, inputs.logits
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
        packed=_is_packed(k) or _is_packed(v),
        itemsize=query.element_size(),
    )
    chosen = plan(shapes, _multiprocessors(query.device))
    arguments = {
        **keys_arguments(query, factors.k, rope),
        **mask_arguments(_mask(query, inputs, k.length), query, k.length),
        **page_arguments(k),
        **store_arguments("k", k),
        **store_arguments("v", v),
        "scaling": logits.scaling,
        "softcap": logits.softcap or 1.0,
        "HAS_SOFTCAP": logits.softcap is not None,
    }
    parts = _fitted(chosen, shapes, query, arguments)
    return Partial(*(part.view(batch, q_heads, new, -1) for part in _joined(*parts)))


def _mask(query: Tensor, inputs: AttentionInputs, sealed: int) -> Tensor | None:
    """Return the mask of the sealed tokens, with the logits of what their keys leave out added to it."""
    mask, offset = inputs.logits.mask, inputs.key_offset
    if offset is None:
        return mask
    added = inputs.logits.scaling * offset.products(query, 0, sealed)
    if mask is None:
        return added
    mask = mask[..., :sealed]
    return added.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else added + mask


def _fitted(chosen: Plan, shapes: Shapes, query: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the partials of all splits, by the first plan whose programs fit in shared memory."""
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
    from cskv.attention.triton import kernels

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
        **arithmetic_arguments(query.dtype),
    )
    return most, total, sums


def _joined(most: Tensor, total: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join the partials of all splits, (splits, lines[, rank])."""
    from cskv.attention.triton import kernels

    splits, lines, rank = sums.shape
    if splits == 1:
        return most, total, sums
    out = torch.empty_like(most[0]), torch.empty_like(total[0]), torch.empty_like(sums[0])
    grid = (lines, -(-rank // JOIN_BLOCK))
    kernels.join[grid](most, total, sums, *out, splits, lines, rank, STEP=JOIN_STEP, BLOCK=JOIN_BLOCK)
    return out


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

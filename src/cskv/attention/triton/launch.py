"""Attention on the compressed cache with Triton kernels: three launches, or two where nothing is rebuilt.

    scores     products of queries and rebuilt keys, where keys are rotated after rebuilding
    partials   every range of tokens as a partial in latents
    outputs    ranges joined, U_v, the exact branch and the sinks

Nothing here waits for the device, and sizes follow from shapes alone (of latents in pages, from the bound on their
lengths that the host knows), so a step can be captured in a CUDA graph after a first call outside of it (kernels are
compiled, and tables of grids copied, when they are first used).

There is no autotuning: it would time kernels in the middle of a step. The choices of `plan` are fixed, and a plan that
a device has too little shared memory for is made smaller once and remembered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.inputs import AttentionInputs
from cskv.attention.triton.arguments import (
    Store,
    arithmetic_arguments,
    exact_arguments,
    mask_arguments,
    page_arguments,
    query_arguments,
    rebuild_arguments,
)
from cskv.attention.triton.plan import (
    LEAST,
    LEAST_INT8,
    PRODUCTS,
    TILE,
    Plan,
    Shapes,
    padded,
    plan_partials,
    plan_scores,
    smaller,
)
from cskv.attention.triton.refusal import refusal
from cskv.latents.view import Latents

Found = TypeVar("Found")
JOIN_STEP, JOIN_LATENTS, EXACT_TILE = 32, 256, 32  # ranges, latents and exact tokens at a time, of `outputs`
INTERPRETED_MULTIPROCESSORS = 2

_fitting: dict[tuple[str, Plan], Plan] = {}  # of plans that needed too much shared memory, the ones that did not


class Ranges(NamedTuple):
    """Attention to every range of sealed tokens, in fp32 and in latents; lines are query rows of the whole batch."""

    most: Float[Tensor, "splits lines"]
    total: Float[Tensor, "splits lines"]
    sums: Float[Tensor, "splits lines value_rank"]


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
    from cskv.attention.triton import outputs as kernels

    view, up, bias, sealed = inputs.view, inputs.factors.v.up, inputs.factors.v.bias, None
    if view.k is not None and view.v is not None and view.sealed:
        sealed = sealed_ranges(query, view.k, view.v, inputs)
    up = up if up.stride(1) == 1 else up.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rank = up.shape[1]
    latents = min(padded(rank), JOIN_LATENTS)
    kernels.outputs[(query.shape[:3].numel(),)](
        **exact_arguments(query, view, inputs.logits, inputs.logits.mask),
        most_in=None if sealed is None else sealed.most,
        total_in=None if sealed is None else sealed.total,
        sums_in=None if sealed is None else sealed.sums,
        up=up,
        value_bias=None if bias is None else bias.contiguous(),
        out=out,
        splits=0 if sealed is None else sealed.most.shape[0],
        lines=query.shape[:3].numel(),
        value_rank=rank,
        up_row=up.stride(0),
        HAS_SEALED=sealed is not None,
        HAS_BIAS=bias is not None,
        TILE=EXACT_TILE,
        STEP=JOIN_STEP,
        LATENTS=latents,
        BLOCKS=-(-rank // latents),
        num_warps=8,
    )
    return out


def sealed_ranges(query: Tensor, k: Latents, v: Latents, inputs: AttentionInputs) -> Ranges:
    """Attend to the compressed branch: every range of its tokens by itself, with sums in latents."""
    return _Sealed.of(query, k, v, inputs).ranges()


@dataclass(frozen=True)
class _Sealed:
    """A launch on the compressed branch.

    Attributes:
        query, inputs: of attention.
        shapes: problem sizes.
        keys, values: how latents are read.
        shared: arguments of both kernels.
    """

    query: Tensor
    inputs: AttentionInputs
    shapes: Shapes
    keys: Store
    values: Store
    shared: dict[str, Any]

    @classmethod
    def of(cls, query: Tensor, k: Latents, v: Latents, inputs: AttentionInputs) -> _Sealed:
        in_int8 = inputs.rotation is not None and inputs.int8_keys is not None
        batch, q_heads, new, head_dim = query.shape
        groups = inputs.factors.k.groups
        keys, values = Store.of(k, groups), Store.of(v, groups)
        shapes = Shapes(
            batch=batch,
            groups=groups,
            rows=q_heads // groups * new,
            head_rows=q_heads // inputs.view.keys.shape[1] * new,
            tokens=k.length,
            keys=keys.pieces("k", LEAST_INT8 if in_int8 else LEAST),
            values=values.pieces("v"),
            columns=2 * padded(head_dim // 2),
            packed=keys.packed is not None or values.packed is not None,
            in_int8=in_int8,
            itemsize=query.element_size(),
        )
        shared = {**page_arguments(k), **arithmetic_arguments(query.dtype)}
        shared |= {"lines": shapes.lines, "groups": groups, "key_rank": keys.rank, "K_BLOCKS": shapes.keys.blocks}
        return cls(query, inputs, shapes, keys, values, shared | shapes.keys.arguments("K"))

    def ranges(self) -> Ranges:
        """Launch the kernels: once, or for as many tokens at a time as the products of queries and keys may take."""
        tokens, shapes, inputs = self.shapes.tokens, self.shapes, self.inputs
        if inputs.rotation is None:
            return self._partials(0, tokens, query_arguments(self.query, inputs.factors.k), None)
        rebuild = rebuild_arguments(self.query, inputs.factors.k, inputs.rotation, inputs.int8_keys)
        query = {name: rebuild[name] for name in ("query", "query_batch", "query_row")}
        query |= {"query_scale": None, "query_bias": None, "HAS_SCALE": False, "HAS_BIAS": False}
        most = max(TILE, PRODUCTS // (shapes.batch * shapes.lines) // TILE * TILE)
        found = []
        for begin in range(0, tokens, most):
            end = min(tokens, begin + most)
            found.append(self._partials(begin, end, query, self._products(begin, end, rebuild)))
        return found[0] if len(found) == 1 else Ranges(*map(torch.cat, zip(*found, strict=True)))

    def _products(self, begin: int, end: int, rebuild: dict[str, Any]) -> Tensor:
        """Return the products of queries and keys that are rebuilt, (batch, tokens, lines)."""
        from cskv.attention.triton import scores as kernels

        shapes = self.shapes
        products = self.query.new_empty(shapes.batch, end - begin, shapes.lines, dtype=torch.float32)
        group_heads = shapes.rows // shapes.head_rows

        def launch(plan: Plan) -> Tensor:
            head_blocks = shapes.groups * group_heads // plan.heads
            kernels.scores[(head_blocks * plan.row_blocks, plan.splits, shapes.batch)](
                **self.shared,
                **self.keys.arguments("k", plan.tile),
                **rebuild,
                products=products,
                tokens=end,
                begin=begin,
                group_heads=group_heads,
                head_rows=shapes.head_rows,
                row_blocks=plan.row_blocks,
                products_batch=products.stride(0),
                HEADS=plan.heads,
                ROWS=plan.rows,
                TILE=plan.tile,
                STAGES=plan.stages,
                num_warps=plan.warps,
            )
            return products

        return _fitted("scores", plan_scores(shapes, _multiprocessors(self.query.device)), launch)

    def _partials(self, begin: int, end: int, query: dict[str, Any], products: Tensor | None) -> Ranges:
        """Return the ranges of some tokens, given the products with their keys, or queries that have absorbed U_k."""
        from cskv.attention.triton import partials as kernels

        shapes, logits, rank = self.shapes, self.inputs.logits, self.values.rank
        lines = shapes.batch * shapes.lines

        def launch(plan: Plan) -> Ranges:
            most, total = (self.query.new_empty(plan.splits, lines, dtype=torch.float32) for _ in range(2))
            sums = self.query.new_empty(plan.splits, lines, rank, dtype=torch.float32)
            grid = (plan.row_blocks * shapes.values.blocks, plan.splits, shapes.batch * shapes.groups)
            kernels.partials[grid](
                **self.shared,
                **query,
                **self.keys.arguments("k", plan.tile),
                **self.values.arguments("v", plan.tile),
                **shapes.values.arguments("V"),
                **mask_arguments(_mask(self.query, self.inputs, shapes.tokens), self.query, shapes.tokens),
                products=products,
                most_out=most,
                total_out=total,
                sums_out=sums,
                tokens=end,
                begin=begin,
                rows=shapes.rows,
                new=self.query.shape[2],
                block_rows=plan.rows,
                row_blocks=plan.row_blocks,
                value_rank=rank,
                scaling=logits.scaling,
                softcap=logits.softcap or 1.0,
                products_batch=0 if products is None else products.stride(0),
                HAS_PRODUCTS=products is not None,
                HAS_SOFTCAP=logits.softcap is not None,
                ROWS=padded(plan.rows),
                TILE=plan.tile,
                STAGES=plan.stages,
                num_warps=plan.warps,
            )
            return Ranges(most, total, sums)

        return _fitted("partials", plan_partials(shapes, _multiprocessors(self.query.device)), launch)


def _fitted(name: str, chosen: Plan, launch: Callable[[Plan], Found]) -> Found:
    """Launch by the first plan whose programs fit in shared memory."""
    from triton.runtime.errors import OutOfResources

    current = _fitting.get((name, chosen), chosen)
    while True:
        try:
            return launch(current)
        except OutOfResources:
            less = smaller(current)
            if less is None:
                raise
            current = _fitting[name, chosen] = less


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


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

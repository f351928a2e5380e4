"""Attention on the compressed cache by one call of the compiled kernels, or why they cannot do it."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention.attend import attends_to_latents
from cskv.attention.cpu.arguments import KINDS, Arguments
from cskv.attention.cpu.library import Library, lacking, library
from cskv.attention.inputs import AttentionInputs, KeyOffset, Rotation
from cskv.factorization.factors import LayerFactors
from cskv.latents.pages import PagedLatents
from cskv.latents.view import Latents
from cskv.scratch import Scratch

MOST_THREADS = 256
Query = Float[Tensor, "batch q_heads new head_dim"]


def attempt(query: Query, inputs: AttentionInputs, scratch: Scratch, *, asked: bool) -> Query | None:
    """Compute `attention` where the kernels can; else say once why not, and return None.

    Args:
        query, inputs: of `attention`.
        scratch: memory to use again.
        asked: whether these kernels were asked for by name. Where they were not, it is no news that there are none.
    """
    loaded = library()
    if loaded is None:
        if asked:
            _say_once(str(lacking()))
        return None
    if (reason := refusal(query, inputs)) is not None:
        _say_once(reason)
        return None
    return attention(query, inputs, scratch, loaded)


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"attention on the compressed cache by torch, not by the CPU kernels: {reason}", stacklevel=4)


def attention(query: Query, inputs: AttentionInputs, scratch: Scratch, loaded: Library) -> Query:
    """Compute `cskv.attention.attend.attention` by the kernels of a library, sums in fp32.

    `refusal` has to be None for the same arguments.
    """
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    arguments = Arguments()
    call = arguments.step(query, inputs.view, inputs.logits, output) + _sealed(arguments, query.dtype, inputs)
    threads, memory = min(torch.get_num_threads(), MOST_THREADS), scratch.memory(0)
    while needed := loaded.attend(loaded.level, call, threads, memory.data_ptr(), memory.shape[0]):
        memory = scratch.memory(needed)
    return output


class _Kept(NamedTuple):
    """The fields of sealed tokens, and what they were made of beside the latents of keys."""

    fields: bytes
    factors: LayerFactors
    v: ref[Latents]
    rotation: ref[Rotation] | None
    offset: ref[KeyOffset] | None


_KEPT: WeakKeyDictionary[Latents, _Kept] = WeakKeyDictionary()  # by the latents of keys


def _sealed(arguments: Arguments, dtype: torch.dtype, inputs: AttentionInputs) -> bytes:
    """Return the fields of sealed tokens. Those of a cache are kept for the steps that come until others are sealed."""
    view, rotation, offset = inputs.view, inputs.rotation, inputs.key_offset
    kept = None if view.k is None else _KEPT.get(view.k)
    if kept is not None:
        same = kept.factors is inputs.factors and kept.v() is view.v
        if same and _is(kept.rotation, rotation) and _is(kept.offset, offset):
            return kept.fields
    before = len(arguments.kept)
    fields = arguments.sealed(dtype, inputs)
    lasts = len(arguments.kept) == before  # what was converted lives as long as this call
    if lasts and view.k is not None and view.v is not None and not isinstance(view.k, PagedLatents):
        own = None if rotation is None else ref(rotation), None if offset is None else ref(offset)
        _KEPT[view.k] = _Kept(fields, inputs.factors, ref(view.v), *own)
    return fields


def _is(kept: ref[Any] | None, own: Any) -> bool:
    return own is None if kept is None else kept() is own


def refusal(query: Query, inputs: AttentionInputs) -> str | None:
    """Return why the kernels cannot do this; None where they can."""
    view, factors, rotation, offset = inputs.view, inputs.factors, inputs.rotation, inputs.key_offset
    if not query.is_cpu:
        return f"they need a CPU, and the query is on {query.device.type}"
    if query.dtype not in KINDS:
        return f"they compute in 16 or 32 bits, and the query is {query.dtype}"
    mask = inputs.logits.mask
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in KINDS:
        return f"they add masks of 16 or 32 bits, and this is {mask.dtype}"
    if not attends_to_latents(query.shape[2], query.shape[1], view.keys.shape[1]):
        return f"{query.shape[2]} new tokens are too many, as in a prefill: rebuild keys and values for them"
    if torch.is_grad_enabled():
        read = query, view.keys, view.values, factors.k.up, factors.v.up
        if any(part.requires_grad for part in read):
            return "they record no gradients; attend under torch.no_grad()"
    if view.k is None or view.v is None:
        return None
    if inputs.value_heads is not None:
        return "they do not normalise values"
    if inputs.int8_keys is not None and rotation is not None:
        return "they rebuild no keys in 8 bits"
    if not (_can_rotate(rotation) and _can_rotate(None if offset is None else offset.rotation)):
        return "they normalise keys by head and rotate them by halves, and do nothing else to them"
    if factors.k.groups != factors.v.groups:
        return f"they share a tile of tokens: {factors.k.groups} groups of keys, {factors.v.groups} of values"
    paged = isinstance(view.k, PagedLatents), isinstance(view.v, PagedLatents)
    if any(paged) and not (all(paged) and view.k.table is view.v.table and view.k.lengths is view.v.lengths):  # type: ignore[union-attr]
        return "they find keys and values by one table of pages"
    return None


def _can_rotate(rotation: Rotation | None) -> bool:
    return rotation is None or (rotation.is_plain and rotation.cos is not None and rotation.sin is not None)

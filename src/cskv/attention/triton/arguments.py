"""Tensors, strides and constants of the Triton kernels, from the inputs of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cskv.attention.attend import per_head
from cskv.attention.inputs import Logits, Rotation
from cskv.attention.int8_keys import Int8Keys
from cskv.attention.triton.plan import LEAST, LEAST_SUMS, MOST_KEPT, PIECES, Pieces, by_planes, cut, padded, whole
from cskv.factorization.factors import Factors
from cskv.latents.pages import PagedLatents, Pages
from cskv.latents.view import Latents, PackedLatents, PlainLatents, View
from cskv.quantization.tables import channel_table, most_planes

MASK_STRIDES = ("mask_batch", "mask_head", "mask_new", "mask_token")
ALIGNED = 16  # bytes that are loaded at a time


def query_arguments(query: Tensor, factors: Factors) -> dict[str, Any]:
    """Return the query that has absorbed U_k, and what a key bias adds to its products."""
    head_dim, bias, of_query = query.shape[3], factors.bias, None
    if bias is not None:
        of_query = per_head(query.float(), bias.float().view(1, -1, head_dim, 1)).contiguous()
    query, scale = _absorbed(query, factors.up.unflatten(0, (-1, head_dim))[None])
    rows = _rows_contiguous(query.flatten(1, 2))
    return {
        "query": rows,
        "query_scale": scale,
        "query_bias": of_query,
        "query_batch": rows.stride(0),
        "query_row": rows.stride(1),
        "HAS_SCALE": scale is not None,
        "HAS_BIAS": of_query is not None,
    }


def rebuild_arguments(
    query: Tensor, factors: Factors, rope: Rotation, int8_keys: Int8Keys | None = None
) -> dict[str, Any]:
    """Return the query as it is, and what rebuilds keys."""
    head_dim, bias, norm = query.shape[3], factors.bias, rope.norm
    up = _aligned(factors.up) if int8_keys is None else int8_keys.up
    cos, sin = (_by_sequence(part, query.shape[0]) for part in (rope.cos, rope.sin))
    rows = _rows_contiguous(query.flatten(1, 2))
    return {
        "query": rows,
        "up": up,
        "up_steps": None if int8_keys is None else int8_keys.steps,
        "balance": None if int8_keys is None else int8_keys.balance,
        "key_bias": None if bias is None else bias.contiguous(),
        "cos": cos,
        "sin": sin,
        "key_norm": norm.weight.contiguous() if norm is not None else None,
        "norm_eps": norm.eps if norm is not None else 0.0,
        "query_batch": rows.stride(0),
        "query_row": rows.stride(1),
        "up_row": up.stride(0),
        "cos_batch": cos.stride(0),
        "cos_token": cos.stride(1),
        "sin_batch": sin.stride(0),
        "sin_token": sin.stride(1),
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": cos.shape[-1],
        "HALF": padded(head_dim // 2),
        "IS_SYMMETRIC": rope.is_symmetric,
        "IN_INT8": int8_keys is not None,
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
    return {"mask": mask, "MASK": kind, **dict(zip(MASK_STRIDES, strides, strict=True))}


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


@dataclass(frozen=True)
class Store:
    """How the kernels read the latents of keys or of values.

    Attributes:
        data: latents, or codes; its strides are of sequences, or of pages, and of tokens.
        rank: latents of a group.
        readable: of a group, those that may be read of a row, zeros behind the rank included, and of codes the bytes of
            a plane. A multiple of more numbers is loaded faster.
        bits: of every code, where all have as many and their bytes are found by arithmetic; 0 where by a table.
        plane_bytes: of a token's codes then, of each of the channels that share a byte.
        by_planes: whether pieces are the planes of a byte.
    """

    data: Tensor
    rank: int
    readable: int
    packed: PackedLatents | Pages | None = None
    token_block: Tensor | None = None
    bits: int = 0
    plane_bytes: int = 0
    by_planes: bool = False

    @classmethod
    def of(cls, latents: Latents, groups: int) -> Store:
        """Read them off the latents of all groups."""
        packed: PackedLatents | Pages | None = None
        rows: Tensor | None = None
        padding = 0
        if isinstance(latents, PlainLatents):
            data, padding = latents.tokens, latents.padding
        elif isinstance(latents, PagedLatents):
            data, packed = latents.pages.data, latents.pages if latents.pages.grid is not None else None
        else:
            assert isinstance(latents, PackedLatents), "refused otherwise"
            data, packed, rows = latents.payload, latents, latents.token_block
        data, rank = _rows_contiguous(data), latents.rank // groups
        if packed is None:
            return cls(data, rank, rank + (padding if groups == 1 else 0))
        grid = packed.grid
        assert grid is not None, "packed latents have all"
        bits = grid.widths[0][0] if len(grid.widths) == 1 and 8 % grid.widths[0][0] == 0 else 0
        plane, planes = grid.row_bytes, 8 // bits if bits else 0
        by_planes = groups == 1 and bool(bits) and planes <= PIECES and padded(plane) * planes <= MOST_KEPT
        if not bits or not (by_planes or (groups > 1 and plane % rank == 0)):
            return cls(data, rank, rank, packed, rows)
        wide = -(-plane // ALIGNED) * ALIGNED
        return cls(data, rank, wide if wide <= data.stride(1) else plane, packed, rows, bits, plane, by_planes)

    def pieces(self, letter: str, least: int = LEAST) -> Pieces:
        """Return how latents of keys ("k"), in pieces of at least so many, or of values ("v") are cut."""
        if self.by_planes:
            return by_planes(self.plane_bytes, 8 // self.bits, least if letter == "k" else LEAST_SUMS)
        return cut(self.rank, least) if letter == "k" else whole(self.rank)

    def arguments(self, letter: str, tile: int) -> dict[str, Any]:
        """Return the kernels' arguments of keys ("k") or values ("v"), of which they read `tile` tokens at a time."""
        scales, minima, table, planes, block_tokens, block_channels = None, None, None, 0, 1, 1
        page = self.packed.block_size if isinstance(self.packed, Pages) else 0
        if self.packed is not None:
            grid = self.packed.grid
            assert grid is not None, "packed latents have all"
            assert self.packed.scales is not None, "packed latents have all"
            assert self.packed.minima is not None, "packed latents have all"
            scales, minima = _rows_contiguous(self.packed.scales), _rows_contiguous(self.packed.minima)
            if scales.stride() != minima.stride():
                scales, minima = scales.contiguous(), minima.contiguous()
            table, planes = channel_table(grid, self.data.device), most_planes(grid)
            block_tokens, block_channels = grid.block_tokens, grid.block_channels
        blocks_of = block_tokens > 1 and self.bits and tile % block_tokens == 0 and page % tile == 0
        blocks_of = blocks_of and self.token_block is None
        channels_of = block_channels > 1 and block_channels & (block_channels - 1) == 0 and self.by_planes
        channels_of = channels_of and (self.bits == 8 or self.plane_bytes % block_channels == 0)
        unit = next(size for size in (16, 8, 4, 2, 1) if self.readable % size == 0)
        upper = letter.upper()
        return {
            f"{letter}_data": self.data,
            f"{letter}_batch": self.data.stride(0),
            f"{letter}_token": self.data.stride(1),
            f"{letter}_scales": scales,
            f"{letter}_minima": minima,
            f"{letter}_rows": self.token_block,
            f"{letter}_table": table,
            f"{letter}_parameter_batch": 0 if scales is None else scales.stride(0),
            f"{letter}_parameter_row": 0 if scales is None else scales.stride(1),
            f"{letter}_units": self.readable // unit,
            f"{letter}_plane": self.plane_bytes,
            f"{upper}_UNIT": unit,
            f"{upper}_BITS": self.bits,
            f"{upper}_BY_PLANES": self.by_planes,
            f"{upper}_PLANES": planes,
            f"{upper}_BLOCK_TOKENS": block_tokens,
            f"{upper}_BLOCK_CHANNELS": block_channels,
            f"{upper}_BLOCKS_OF": block_tokens if blocks_of else 0,
            f"{upper}_CHANNELS_OF": block_channels if channels_of else 0,
            f"{upper}_HAS_ROWS": self.token_block is not None,
        }


def arithmetic_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """Return the dtype and precision of the products: fp32 goes without TF32."""
    import triton.language as tl

    from cskv.attention.triton import tiles

    return {
        "ELEMENT": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype],
        "EMULATED": tiles.INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def exact_arguments(query: Tensor, view: View, logits: Logits, mask: Tensor | None) -> dict[str, Any]:
    """Return the exact tokens, and what there is to say of them; `mask` is that of all tokens."""
    keys, values, exists = _rows_contiguous(view.keys), _rows_contiguous(view.values), view.exists
    query = _rows_contiguous(query)
    batch, heads, new, _ = query.shape
    arguments = {"mask": None, "MASK": 0, **dict.fromkeys(MASK_STRIDES, 0)}
    if mask is not None:
        arguments = mask_arguments(mask, query, mask.shape[-1])
    if exists is not None:
        exists = exists.expand(batch, -1).view(torch.uint8)
    return arguments | {
        "query": query,
        "keys": keys,
        "values": values,
        "exists": exists,
        "sinks": logits.sinks,
        "exact": keys.shape[2],
        "sealed": view.sealed,
        "new": new,
        "q_heads": heads,
        "head_rows": heads // keys.shape[1] * new,
        "scaling": logits.scaling,
        "softcap": logits.softcap or 1.0,
        **_strides("query", query, ("batch", "head", "new")),
        **_strides("key", keys, ("batch", "head", "token")),
        **_strides("value", values, ("batch", "head", "token")),
        "exists_batch": 0 if exists is None else exists.stride(0),
        "exists_token": 0 if exists is None else exists.stride(1),
        "HEAD_DIM": query.shape[3],
        "CHANNELS": padded(query.shape[3]),
        "HAS_EXISTS": exists is not None,
        "HAS_SINKS": logits.sinks is not None,
        "HAS_SOFTCAP": logits.softcap is not None,
    }


def _strides(name: str, part: Tensor, axes: tuple[str, ...]) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, part.stride(), strict=False)}


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

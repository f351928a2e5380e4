"""The fields of a call, in the order of `kernels/call.h`: sizes, addresses and strides in bytes, 8 bytes each."""

from __future__ import annotations

from functools import lru_cache
from struct import Struct

import torch
from torch import Tensor

from cskv.attention.inputs import AttentionInputs, KeyOffset, Logits, Rotation
from cskv.factorization.factors import Factors
from cskv.latents.pages import PagedLatents
from cskv.latents.view import Latents, PackedLatents, View
from cskv.quantization.grid import Grid

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PACKED, BOOL = 3, 4
STEP = Struct("=21q 2d 8q")
SEALED = Struct("=2q 32q 5q 6q 8q 2qdq")
NO_LATENTS = (0,) * 16
NO_PAGES = (0,) * 5
NO_EXISTS = (0,) * 2
NO_MASK = (0,) * 6
Fields = tuple[int, ...]


class Arguments:
    """The fields of one call, in two parts: what every step changes, and what stays while no token is sealed.

    Attributes:
        kept: tensors made for the call, which have to outlive it: the fields hold their addresses alone.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def step(self, query: Tensor, view: View, logits: Logits, output: Tensor) -> bytes:
        """Return the first part.

        Args:
            query: (batch, q_heads, new, head_dim), of the dtype of factors and exact tokens.
            view: of the exact tokens.
            logits: of all.
            output: of the query's shape and dtype, packed together.
        """
        query, keys, values = self._rows(query), self._rows(view.keys), self._rows(view.values)
        exists, mask, kind = view.exists, logits.mask, KINDS[query.dtype]
        batch, q_heads, new, head_dim = query.shape
        _, kv_heads, recent, _ = keys.shape
        size = 2 if kind else 4
        return STEP.pack(
            batch, q_heads, kv_heads, new, head_dim, kind, query.data_ptr(), *_strides(query, size),
            keys.data_ptr(), values.data_ptr(), *_strides(keys, size), *_strides(values, size), recent,
            *(NO_EXISTS if exists is None else self._exists(exists)), logits.scaling, logits.softcap or 0.0,
            *(NO_MASK if mask is None else self._mask(mask)), self._sinks(logits.sinks), output.data_ptr(),
        )  # fmt: skip

    def sealed(self, dtype: torch.dtype, inputs: AttentionInputs) -> bytes:
        """Return the second part, for a query of a dtype and what the kernels can do, see `refusal`."""
        view, factors, rotation, offset = inputs.view, inputs.factors, inputs.rotation, inputs.key_offset
        return SEALED.pack(
            view.sealed, factors.k.groups, *self._latents(view.k), *self._latents(view.v), *self._pages(view.k),
            *self._factors(factors.k, dtype), *self._factors(factors.v, dtype), *self._angles(rotation, offset, dtype),
            *self._norm(rotation, dtype), *self._constant(offset),
        )  # fmt: skip

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose last dimension is packed together."""
        if tensor.stride()[-1] == 1:
            return tensor
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor

    def _typed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the dtype that the kernels take it for, its last dimension packed together."""
        if tensor.dtype == dtype and tensor.stride()[-1] == 1:
            return tensor
        tensor = tensor.to(dtype).contiguous()
        self.kept.append(tensor)
        return tensor

    def _exists(self, exists: Tensor) -> Fields:
        exists = self._rows(exists)
        return exists.data_ptr(), exists.stride(0)

    def _latents(self, latents: Latents | None) -> Fields:
        if latents is None:
            return NO_LATENTS
        if isinstance(latents, PagedLatents):
            pages = latents.pages
            page, row = pages.data.stride(0), pages.data.stride(1)
            if pages.grid is None:
                size = pages.data.element_size()
                data = pages.data.data_ptr(), KINDS[pages.dtype], pages.rank, 0, row * size
                return (*data, *(0,) * 8, pages.block_size, page * size, 0)
            scales, minima = pages.scales, pages.minima
            assert scales is not None, "packed pages have parameters"
            assert minima is not None, "packed pages have parameters"
            return (
                pages.data.data_ptr(), PACKED, pages.rank, 0, row, scales.data_ptr(), minima.data_ptr(), 0,
                2 * scales.stride(1), *_blocks(pages.grid), 0, pages.block_size, page, 2 * scales.stride(0),
            )  # fmt: skip
        if isinstance(latents, PackedLatents):
            payload, scales, minima, rows = latents.payload, latents.scales, latents.minima, latents.token_block
            own = 0 if rows is None else rows.data_ptr()
            return (
                payload.data_ptr(), PACKED, latents.rank, payload.stride(0), payload.stride(1), scales.data_ptr(),
                minima.data_ptr(), 2 * scales.stride(0), 2 * scales.stride(1), *_blocks(latents.grid), own, 0, 0, 0,
            )  # fmt: skip
        tokens, kind = latents.tokens, KINDS[latents.tokens.dtype]
        size = 2 if kind else 4
        batch, row, _ = tokens.stride()
        return tokens.data_ptr(), kind, tokens.shape[2], batch * size, row * size, *NO_LATENTS[5:]

    def _pages(self, latents: Latents | None) -> Fields:
        if not isinstance(latents, PagedLatents):
            return NO_PAGES
        table, lengths = self._rows(latents.table), self._rows(latents.lengths)
        size = table.element_size()
        return table.data_ptr(), table.stride(0) * size, size, lengths.data_ptr(), lengths.element_size()

    def _factors(self, factors: Factors, dtype: torch.dtype) -> Fields:
        up, bias = self._typed(factors.up, dtype), factors.bias
        row = up.stride()[0] * up.element_size()
        return up.data_ptr(), row, 0 if bias is None else self._typed(bias, dtype).data_ptr()

    def _angles(self, rotation: Rotation | None, offset: KeyOffset | None, dtype: torch.dtype) -> Fields:
        if offset is not None:
            rotation = offset.rotation
        if rotation is None or rotation.cos is None or rotation.sin is None:
            return (0,) * 8
        cos, sin = self._typed(rotation.cos, dtype), self._typed(rotation.sin, dtype)
        size = cos.element_size()
        cos_batch, cos_row, _ = cos.stride()
        sin_batch, sin_row, _ = sin.stride()
        several, _, rotary = cos.shape
        if several == 1:
            cos_batch = sin_batch = 0
        return (
            rotary, cos.data_ptr(), sin.data_ptr(), cos_batch * size, cos_row * size, sin_batch * size, sin_row * size,
            int(rotation.is_symmetric),
        )  # fmt: skip

    def _norm(self, rotation: Rotation | None, dtype: torch.dtype) -> tuple[int, int, float]:
        if rotation is None or rotation.norm is None:
            return int(rotation is not None), 0, 0.0
        return 1, self._typed(rotation.norm.weight, dtype).data_ptr(), rotation.norm.eps

    def _constant(self, offset: KeyOffset | None) -> Fields:
        return (0,) if offset is None else (self._typed(offset.constant, torch.float32).data_ptr(),)

    def _mask(self, mask: Tensor) -> Fields:
        size, shape = mask.element_size(), mask.shape
        kind = BOOL if mask.dtype == torch.bool else KINDS[mask.dtype]
        strides = [0 if shape[dim] == 1 else mask.stride(dim) * size for dim in range(4)]
        return mask.data_ptr(), kind, *strides

    def _sinks(self, sinks: Tensor | None) -> int:
        return 0 if sinks is None else self._typed(sinks, torch.float32).data_ptr()


def _strides(tensor: Tensor, size: int) -> Fields:
    batch, heads, tokens, _ = tensor.stride()
    return batch * size, heads * size, tokens * size


@lru_cache(maxsize=1024)
def _runs(grid: Grid) -> Tensor:
    return torch.tensor([*(number for run in grid.widths for number in run), 0, 0])


def _blocks(grid: Grid) -> Fields:
    """Return the size of a block, and the runs of widths, which are kept."""
    return grid.block_tokens, grid.block_channels, _runs(grid).data_ptr()

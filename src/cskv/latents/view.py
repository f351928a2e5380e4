"""The tensors that a query reads of one layer's cache and their layout, without a word on how they came there.

The cache makes views and attention reads them. Neither knows the other, so kernels are tested without a cache and the
cache without kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import BFloat16, Bool, Float, Int, UInt8
from torch import Tensor

from cskv.latents.layout import Layout
from cskv.latents.pages import PagedLatents
from cskv.quantization.grid import Grid, dequantise
from cskv.scratch import Scratch


@dataclass(frozen=True, eq=False)
class PlainLatents:
    """Latents in the dtype in which they came.

    Attributes:
        tokens: the latents. Rows of a batch may be further apart in memory, with spare capacity between.
        padding: how many zeros lie behind the latents of every token, which a kernel may read with them.
    """

    tokens: Float[Tensor, "batch tokens rank"]
    padding: int = 0
    lengths: None = field(default=None, init=False)
    granularity: int = field(default=1, init=False)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def rank(self) -> int:
        return self.tokens.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype

    def read(
        self, start: int = 0, stop: int | None = None, scratch: Scratch | None = None
    ) -> Float[Tensor, "batch tokens rank"]:
        return self.tokens[:, start:stop]


@dataclass(frozen=True, eq=False)
class PackedLatents:
    """Latents as codes of a few bits, with a minimum and a scale per block.

    Attributes:
        payload: codes, in the layout of `cskv.quantization.packing`.
        scales, minima: of the blocks of `grid`.
        grid: widths and blocks.
        dtype: that of the latents before they were packed.
        token_block: the row of `scales` and `minima` that holds for each token. None where blocks of
            `grid.block_tokens` follow one another from the first token on, as they do unless a crop cut one short.
    """

    payload: UInt8[Tensor, "batch tokens bytes"]
    scales: BFloat16[Tensor, "batch token_blocks channel_blocks"]
    minima: BFloat16[Tensor, "batch token_blocks channel_blocks"]
    grid: Grid
    dtype: torch.dtype
    token_block: Int[Tensor, " tokens"] | None = None
    lengths: None = field(default=None, init=False)

    @property
    def length(self) -> int:
        return self.payload.shape[1]

    @property
    def rank(self) -> int:
        return self.grid.rank

    @property
    def granularity(self) -> int:
        return self.grid.block_tokens

    def read(
        self, start: int = 0, stop: int | None = None, scratch: Scratch | None = None
    ) -> Float[Tensor, "batch tokens rank"]:
        payload, scales, minima, rows = self.payload[:, start:stop], self.scales, self.minima, self.token_block
        size = self.grid.block_tokens
        if rows is not None:
            rows = rows[start:stop]
        elif start % size == 0:
            scales, minima = scales[:, start // size :], minima[:, start // size :]
        else:
            rows = torch.arange(start, start + payload.shape[1], device=payload.device) // size
        return dequantise(payload, scales, minima, self.grid, rows, self.dtype, scratch)


Latents = PlainLatents | PackedLatents | PagedLatents
"""Latents of the tokens from the first on, with

length: tokens, of the longest sequence where they differ.
lengths: tokens of every sequence, (batch,), where they differ; None where all have `length`.
rank: latents per token.
dtype: in which they are read.
granularity: tokens that are best read together: a range should begin at a multiple of so many.
read: a range of tokens, (batch, tokens, rank); None reads to the end. Packed latents are unpacked into the scratch, and
    the result is valid until that is used again.
"""


@dataclass(frozen=True)
class View:
    """What a forward's queries read, the tokens that it appends included. It is valid until the next append or crop.

    Attributes:
        keys, values: the exact branch, after norm and RoPE. The newest of its tokens are those of the forward.
        k: latents of the older tokens' keys, before norm and RoPE (commuting ones: after both); None where there are
            no older tokens.
        v: latents of their values; None where `k` is.
        exists: which exact tokens exist, where sequences have different numbers of them, or some places are spare. The
            others hold finite numbers. None: all.
        sinks: how many of the exact tokens, the first ones, stand before the older ones in the model's order. Attention
            needs no order beside that of the mask, which whoever gives it puts into that of the view.
        layout: the model's columns of the tokens of both branches, where rows have different padding; None where all
            tokens are in order but for the sinks. Where a row has no token the mask hides what is there.
    """

    keys: Float[Tensor, "batch kv_heads recent head_dim"]
    values: Float[Tensor, "batch kv_heads recent head_dim"]
    k: Latents | None = None
    v: Latents | None = None
    exists: Bool[Tensor, "batch recent"] | None = None
    sinks: int = 0
    layout: Layout | None = None

    @property
    def sealed(self) -> int:
        """Tokens of the compressed branch."""
        return 0 if self.k is None else self.k.length

    @property
    def length(self) -> int:
        """Tokens of both branches."""
        return self.sealed + self.keys.shape[2]

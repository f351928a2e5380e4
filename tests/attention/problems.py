"""Random attention problems: a view of both branches, factors, and what the backends are told beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cskv.attention.rules import Logits, Rope
from cskv.factorization.factors import Factors, LayerFactors
from cskv.quantization.grid import Grid, quantise
from cskv.view import Latents, PackedLatents, PlainLatents, View


@dataclass(frozen=True)
class Problem:
    """Sizes of a problem, and what is made from them. All is fp32 until `to`.

    Attributes:
        rotary: channels of a head that RoPE turns; None makes keys linear in their latents.
        k_grid, v_grid: (bits, (block tokens, block channels)), or None for plain latents.
    """

    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    k_rank: int = 14
    v_rank: int = 10
    sealed: int = 40
    recent: int = 5
    new: int = 1
    groups: int = 1
    bias: bool = False
    rotary: int | None = 16
    k_grid: tuple[int, tuple[int, int]] | None = None
    v_grid: tuple[int, tuple[int, int]] | None = None
    seed: int = 0

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + sum(shape) + 31 * len(shape)))

    def factors(self) -> LayerFactors:
        kv_dim = self.kv_heads * self.head_dim
        return LayerFactors(
            *(
                Factors(
                    torch.zeros(rank, 1),
                    self.draw(kv_dim, rank // self.groups) / (rank // self.groups) ** 0.5,
                    self.draw(kv_dim) if self.bias else None,
                )
                for rank in (self.k_rank, self.v_rank)
            )
        )

    def view(self, dtype: torch.dtype = torch.float32) -> View:
        exact = [self.draw(self.batch, self.kv_heads, self.recent, self.head_dim + i)[..., i:] for i in (0, 1)]
        keys, values = (part.to(dtype) for part in exact)
        if not self.sealed:
            return View(keys, values)
        k = self._latents(self.draw(self.batch, self.sealed, self.k_rank).to(dtype), self.k_grid)
        v = self._latents(self.draw(self.batch, self.sealed, self.v_rank).to(dtype), self.v_grid)
        return View(keys, values, k, v)

    def query(self) -> Tensor:
        return self.draw(self.batch, self.q_heads, self.new, self.head_dim + 2)[..., 2:]

    def rope(self, dtype: torch.dtype = torch.float32) -> Rope | None:
        if self.rotary is None:
            return None
        angles = torch.arange(self.sealed)[None, :, None] * 10000 ** (-torch.arange(0, self.rotary, 2) / self.rotary)
        angles = torch.cat([angles, angles], dim=-1)
        return Rope(angles.cos().to(dtype), angles.sin().to(dtype), self._heads, is_plain=True)

    def mask(self, kind: str | None) -> Tensor | None:
        """None, "bool" or "additive", with some tokens hidden from everyone and causal among the newest."""
        if kind is None:
            return None
        length = self.sealed + self.recent
        reads = torch.rand(self.batch, 1, 1, length, generator=torch.Generator().manual_seed(self.seed)) > 0.3
        causal = torch.ones(self.new, length, dtype=torch.bool).tril(length - self.new)
        reads = (reads & causal).index_fill(3, torch.tensor([length - self.new]), True)
        return (
            reads if kind == "bool" else torch.zeros(reads.shape).masked_fill_(~reads, torch.finfo(torch.float32).min)
        )

    def logits(self, *, mask: str | None = None, softcap: float | None = None, sinks: bool = False) -> Logits:
        return Logits(self.head_dim**-0.5, softcap, self.mask(mask), self.draw(self.q_heads) if sinks else None)

    def _heads(self, channels: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        assert cos is not None
        assert sin is not None
        assert self.rotary is not None
        heads = channels.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned, rest = heads[..., : self.rotary], heads[..., self.rotary :]
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
        return torch.cat([turned * cos[:, None] + swapped * sin[:, None], rest], dim=-1)

    @staticmethod
    def _latents(latents: Tensor, layout: tuple[int, tuple[int, int]] | None) -> Latents:
        if layout is None:
            return PlainLatents(latents)
        grid = Grid.uniform(latents.shape[2], *layout)
        return PackedLatents(*quantise(latents, grid), grid, latents.dtype)


def doubled(factors: LayerFactors) -> LayerFactors:
    """The same factors in fp64."""
    return factors.to(dtype=torch.float64)

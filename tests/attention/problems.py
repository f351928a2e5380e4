"""Random attention problems: a view of both branches, factors, and what the backends are told beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cskv.attention.inputs import AttentionInputs, Logits, RMSNorm, Rotation, split_heads
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.pages import PageLayout
from cskv.latents.view import Latents, PackedLatents, PlainLatents, View
from cskv.quantization.grid import Grid, quantise
from tests.attention.pages import by_itself, in_pages


@dataclass(frozen=True)
class Problem:
    """Sizes of a problem, and what is made from them. All is fp32 until `to`.

    Attributes:
        rotary: channels of a head that RoPE turns; None makes keys linear in their latents.
        k_grid, v_grid: (bits, (block tokens, block channels)), or None for plain latents.
        norm: whether keys are normalised before they are rotated.
        device: where all of it lies.
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
    norm: bool = False
    device: str = "cpu"

    def draw(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(shape) + 31 * len(shape))
        return torch.randn(shape, generator=generator).to(self.device)

    def factors(self) -> LayerFactors:
        kv_dim = self.kv_heads * self.head_dim
        return LayerFactors(
            *(
                Factors(
                    torch.zeros(rank, 1, device=self.device),
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

    def rope(self, dtype: torch.dtype = torch.float32) -> Rotation | None:
        if self.rotary is None:
            return None
        angles = torch.arange(self.sealed)[None, :, None] * 10000 ** (-torch.arange(0, self.rotary, 2) / self.rotary)
        angles = torch.cat([angles, angles], dim=-1).to(self.device)
        norm = RMSNorm(1 + 0.3 * self.draw(self.head_dim).to(dtype), 1e-2) if self.norm else None
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), self._heads, is_plain=True, norm=norm)

    def inputs(
        self, logits: Logits | None = None, dtype: torch.dtype = torch.float32, view: View | None = None
    ) -> AttentionInputs:
        """What attention is given beside the query."""
        view = self.view(dtype) if view is None else view
        logits = self.logits() if logits is None else logits
        return AttentionInputs(view, self.factors().to(dtype=dtype), self.rope(dtype), logits)

    def mask(self, kind: str | None) -> Tensor | None:
        """None, "bool" or "additive", with some tokens hidden from everyone and causal among the newest."""
        if kind is None:
            return None
        length = self.sealed + self.recent
        reads = torch.rand(self.batch, 1, 1, length, generator=torch.Generator().manual_seed(self.seed)) > 0.3
        causal = torch.ones(self.new, length, dtype=torch.bool).tril(length - self.new)
        reads = (reads & causal).index_fill(3, torch.tensor([length - self.new]), True).to(self.device)
        added = torch.zeros(reads.shape, device=self.device)
        return reads if kind == "bool" else added.masked_fill_(~reads, torch.finfo(torch.float32).min)

    def logits(self, *, mask: str | None = None, softcap: float | None = None, sinks: bool = False) -> Logits:
        return Logits(self.head_dim**-0.5, softcap, self.mask(mask), self.draw(self.q_heads) if sinks else None)

    def _heads(self, channels: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        assert cos is not None
        assert sin is not None
        assert self.rotary is not None
        heads = split_heads(channels, self.head_dim)
        if self.norm:
            weight = (1 + 0.3 * self.draw(self.head_dim)).to(heads.dtype)
            heads = heads * (heads.square().mean(-1, keepdim=True) + 1e-2).rsqrt() * weight
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


@dataclass(frozen=True)
class PagedProblem(Problem):
    """Requests of different lengths, their sealed tokens in pages.

    Attributes:
        lengths: sealed tokens of every request, which `batch` and `sealed` follow from.
        above: how far the bound that is known of them, `sealed`, is above the largest.
        block_size: tokens of a page.
        hides: whether requests have different numbers of exact tokens as well.
        names: the dtype of the table and of the lengths.
    """

    lengths: tuple[int, ...] = (40, 0, 17)
    above: int = 0
    block_size: int = 16
    hides: bool = True
    names: torch.dtype = torch.int32

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", len(self.lengths))
        object.__setattr__(self, "sealed", max(self.lengths) + self.above)

    def paged(self, dtype: torch.dtype = torch.float32) -> View:
        """All requests together."""
        keys, values, k, v = self._parts(dtype)
        layout = PageLayout(self.k_rank, self.v_rank, dtype, *self._grids())
        own = ([part[:length] for part, length in zip(latents, self.lengths)] for latents in (k, v))
        pages = in_pages(*own, layout, self.block_size, most=self.sealed, names=self.names, seed=self.seed)
        exists = self.exists()
        if exists is not None:
            keys, values = (part.masked_fill(~exists[:, None, :, None], 0) for part in (keys, values))
        return View(keys, values, *pages, exists)

    def inputs(
        self, logits: Logits | None = None, dtype: torch.dtype = torch.float32, view: View | None = None
    ) -> AttentionInputs:
        """Of all requests together, unless the view is of one."""
        return super().inputs(logits, dtype, self.paged(dtype) if view is None else view)

    def alone(self, row: int, dtype: torch.dtype = torch.float32) -> View:
        """One request, in memory of its own."""
        length, exists = self.lengths[row], self.exists()
        keys, values, k, v = (part[row] for part in self._parts(dtype))
        if exists is not None:
            keys, values = keys[:, exists[row]], values[:, exists[row]]
        view = View(keys[None], values[None])
        if not length:
            return view
        parts = (by_itself(part[:length], grid) for part, grid in zip((k, v), self._grids()))
        return View(view.keys, view.values, *parts)

    def exists(self) -> Tensor | None:
        """Which exact tokens there are: those of the forward, and some of the older ones."""
        if not self.hides:
            return None
        shape = (self.batch, self.recent)
        exists = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed)) > 0.4
        exists[:, self.recent - self.new :] = True
        return exists.to(self.device)

    def logits_alone(self, row: int, logits: Logits) -> Logits:
        """With the part of the mask that is of one request's tokens."""
        if logits.mask is None:
            return logits
        sealed = torch.arange(self.sealed, device=self.device) < self.lengths[row]
        exists = self.exists()
        recent = sealed.new_ones(self.recent) if exists is None else exists[row]
        return replace(logits, mask=logits.mask[row : row + 1, ..., torch.cat([sealed, recent])])

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Exact keys and values of all requests, and latents of as many tokens as any has."""
        exact = [self.draw(self.batch, self.kv_heads, self.recent, self.head_dim + i)[..., i:] for i in (0, 1)]
        latents = [self.draw(self.batch, self.sealed, rank) for rank in (self.k_rank, self.v_rank)]
        return tuple(part.to(dtype) for part in (*exact, *latents))

    def _grids(self) -> tuple[Grid | None, Grid | None]:
        layouts = ((self.k_rank, self.k_grid), (self.v_rank, self.v_grid))
        return tuple(None if layout is None else Grid.uniform(rank, *layout) for rank, layout in layouts)  # type: ignore[return-value]


def one_by_one(attention: Callable[..., Tensor], problem: PagedProblem, dtype: torch.dtype, logits: Logits) -> Tensor:
    """Every request's output by itself: computed in fp64 from numbers that are given in `dtype`."""
    query, rows = problem.query().to(dtype).double(), []
    for i in range(problem.batch):
        inputs = problem.inputs(problem.logits_alone(i, logits), dtype, problem.alone(i, dtype))
        rows.append(attention(query[i : i + 1], inputs))
    return torch.cat(rows)

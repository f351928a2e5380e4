"""Cases of a layer's attention that the kernels of every kind of device have to agree with the reference on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cskv.attention import reference
from cskv.attention.attend import attention
from cskv.attention.inputs import AttentionInputs, Logits, RMSNorm, Rotation, split_heads
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.view import Latents, PackedLatents, PlainLatents, View
from cskv.quantization.grid import Grid, quantise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = Grid(((8, 3), (4, 6), (3, 4), (2, 1)), 32, 4)


@dataclass(frozen=True)
class Case:
    """A layer's attention. `k` and `v` are grids, or None for plain latents."""

    sealed: int = 63
    recent: int = 5
    batch: int = 1
    heads: tuple[int, int] = (4, 2)  # query heads and kv heads
    new: int = 1
    head_dim: int = 16
    ranks: tuple[int, int] = (14, 20)  # of a group
    groups: int = 1
    rotary_dim: int | None = None  # None absorbs
    bias: bool = False
    softcap: float | None = None
    sinks: bool = False
    mask: str | None = None
    k: Grid | None = None
    v: Grid | None = None
    token_block: bool = False
    norm: bool = False
    dtype: torch.dtype = torch.float32
    device: str = DEVICE


@dataclass(frozen=True)
class Made:
    """The arguments of attention."""

    query: Tensor
    inputs: AttentionInputs

    def by(self, attention) -> Tensor:
        return attention(self.query, self.inputs)

    def truth(self) -> Tensor:
        return reference.attention(self.query.double(), self.inputs)

    def told(self, **changes) -> Made:
        """With other inputs."""
        return replace(self, inputs=replace(self.inputs, **changes))


def by_torch(made: Made) -> Tensor:
    return attention(made.query, made.inputs, backend="torch")


def make(case: Case) -> Made:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.device, case.dtype)

    q_heads, kv_heads = case.heads
    kv_dim, length = kv_heads * case.head_dim, case.sealed + case.recent
    factors = []
    for rank in case.ranks:
        up = normal(kv_dim, rank) * rank**-0.5
        factors.append(Factors(normal(rank * case.groups, 8), up, normal(kv_dim) if case.bias else None))
    k, v = (
        latents(normal(case.batch, case.sealed + 3, rank * case.groups)[:, : case.sealed], grid, case)
        for rank, grid in zip(case.ranks, (case.k, case.v))
    )
    exact = [normal(case.batch, kv_heads, case.recent, case.head_dim) for _ in range(2)]
    rope = None
    if case.rotary_dim is not None:
        # Halves that differ, which no family has: they show which half of a channel pair is read.
        angles = normal(case.batch, case.sealed, case.rotary_dim).float() * 3
        norm = RMSNorm(1 + 0.3 * normal(case.head_dim), 1e-2) if case.norm else None
        rope = plain_rope(angles.cos().to(case.dtype), angles.sin().to(case.dtype), case.head_dim, norm)
    mask = mask_of(case, length)
    sinks = normal(q_heads) if case.sinks else None
    query = normal(case.batch, case.new, q_heads, case.head_dim).transpose(1, 2)
    logits = Logits(case.head_dim**-0.5, case.softcap, mask, sinks)
    return Made(query, AttentionInputs(View(exact[0], exact[1], k, v), LayerFactors(*factors), rope, logits))


def latents(values: Tensor, grid: Grid | None, case: Case) -> Latents:
    if grid is None:
        return PlainLatents(values)
    if not case.token_block:
        return PackedLatents(*quantise(values, grid), grid, case.dtype)
    cut = min(5, case.sealed)  # a crop has left a first block of 5 tokens
    parts = [quantise(part, grid) for part in (values[:, :cut], values[:, cut:]) if part.shape[1]]
    joined = [torch.cat(tensors, dim=1) for tensors in zip(*parts)]
    size = grid.block_tokens
    rows = [torch.arange(cut) // size, -(-cut // size) + torch.arange(case.sealed - cut) // size]
    return PackedLatents(*joined, grid, case.dtype, torch.cat(rows).to(case.device))


def plain_rope(cos: Tensor, sin: Tensor, head_dim: int, norm: RMSNorm | None = None) -> Rotation:
    def heads(channels: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        assert cos is not None
        assert sin is not None
        x = split_heads(channels, head_dim)
        if norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    return Rotation(cos, sin, heads, is_plain=True, norm=norm)


def mask_of(case: Case, length: int) -> Tensor | None:
    """Each query up to its own token, and without the first tokens of the last sequence: they are padding."""
    if case.mask is None:
        return None
    reads = torch.ones(case.batch, 1, case.new, length, dtype=torch.bool, device=case.device).tril(length - case.new)
    reads[-1, :, :, : length // 3] = False
    if case.mask == "hidden":  # all sealed tokens of the last sequence, and a head in which they are not
        reads = reads.repeat(1, case.heads[0], 1, 1)
        reads[-1, 1:, :, : case.sealed] = False
    if case.mask in ("nothing", "infinitely nothing"):  # a query that is padding itself
        reads[-1] = False
    if case.mask in ("bool", "hidden", "nothing"):
        return reads
    least = -float("inf") if case.mask in ("infinite", "infinitely nothing") else torch.finfo(case.dtype).min
    return torch.zeros(reads.shape, dtype=case.dtype, device=case.device).masked_fill(~reads, least)


def grid(rank: int, bits: int, *block: int) -> Grid:
    return Grid.uniform(rank, bits, (block[0], block[1]))


CASES = {
    "absorbed": Case(sealed=500),
    "one token": Case(sealed=1),
    "one token, rotated": Case(sealed=1, rotary_dim=16),
    "rotated": Case(sealed=500, rotary_dim=16, batch=2),
    "many tokens": Case(sealed=1000, rotary_dim=16, ranks=(41, 41), bias=True),
    "partly rotated": Case(rotary_dim=8, bias=True, batch=2),
    "normalised": Case(rotary_dim=16, norm=True, batch=2, bias=True),
    "normalised, partly rotated": Case(rotary_dim=8, norm=True, heads=(8, 4), groups=2, k=grid(28, 4, 32, 1)),
    "normalised, head of no power of two": Case(rotary_dim=20, head_dim=40, heads=(2, 2), norm=True),
    "bfloat16, normalised": Case(sealed=300, dtype=torch.bfloat16, rotary_dim=16, norm=True),
    "head of no power of two": Case(rotary_dim=20, head_dim=40, heads=(2, 2)),
    "one kv head": Case(heads=(6, 1), new=3, sealed=100),
    "one kv head, rotated": Case(heads=(6, 1), new=3, rotary_dim=16),
    "every head its own": Case(heads=(3, 3), new=3, rotary_dim=16, bias=True),
    "absorbed bias": Case(bias=True, new=3, batch=2),
    "groups": Case(heads=(8, 4), groups=2, bias=True, batch=2),
    "groups, rotated": Case(heads=(8, 4), groups=2, rotary_dim=16, new=3, bias=True),
    "groups, packed": Case(heads=(8, 4), groups=2, k=grid(28, 4, 32, 1), v=grid(40, 3, 1, 32)),
    "softcap and sinks": Case(softcap=0.7, sinks=True, rotary_dim=16),
    "padding": Case(mask="bool", batch=2, new=3, sealed=100),
    "padding, added": Case(mask="added", batch=2, new=3, rotary_dim=16),
    "padding, infinite": Case(mask="infinite", batch=2, sealed=200),
    "all hidden": Case(mask="hidden", batch=2, softcap=5.0, sealed=200),
    "nothing read": Case(mask="nothing", batch=2, sealed=200),
    "nothing read, infinite": Case(mask="infinitely nothing", batch=2, sealed=200, rotary_dim=16),
    "sinks and padding": Case(mask="bool", sinks=True, rotary_dim=8, batch=2),
    "2 bits": Case(sealed=200, k=grid(14, 2, 32, 1), v=grid(20, 2, 1, 32)),
    "3 bits": Case(sealed=200, k=grid(14, 3, 32, 1), v=grid(20, 3, 32, 4), rotary_dim=16),
    "4 bits": Case(sealed=200, k=grid(14, 4, 32, 4), v=grid(20, 4, 1, 20), batch=2),
    "7 bits": Case(k=grid(14, 7, 32, 4), v=grid(20, 7, 1, 7), batch=2),
    "8 bits": Case(k=grid(14, 8, 1, 32), v=grid(20, 8, 32, 1), rotary_dim=8),
    "mixed widths": Case(sealed=100, k=MIXED, v=grid(20, 4, 1, 32), rotary_dim=16, batch=2),
    "only keys packed": Case(k=MIXED),
    "a block cut short": Case(sealed=100, k=MIXED, v=grid(20, 4, 32, 1), token_block=True, batch=2),
    "a block cut short, rotated": Case(sealed=100, v=grid(20, 4, 32, 1), token_block=True, rotary_dim=16),
    "wide": Case(ranks=(300, 520), heads=(2, 1)),
    "wide, rotated": Case(ranks=(300, 600), heads=(2, 1), rotary_dim=16, k=grid(300, 3, 32, 1)),
    "many rows": Case(ranks=(205, 300), heads=(10, 5), new=20, recent=20, sealed=70, rotary_dim=16),
    "many rows, absorbed": Case(heads=(10, 5), new=13, recent=13, sealed=70),
    "more rows of a head than a program has": Case(heads=(2, 1), new=40, recent=45, sealed=70, rotary_dim=16),
    "half": Case(sealed=500, dtype=torch.float16, rotary_dim=16, bias=True),
    "half, packed": Case(sealed=200, dtype=torch.float16, k=MIXED, v=grid(20, 4, 1, 32)),
    "bfloat16": Case(sealed=500, dtype=torch.bfloat16, bias=True),
    "bfloat16, rotated": Case(sealed=500, dtype=torch.bfloat16, rotary_dim=16, bias=True, mask="added", batch=2),
    "bfloat16, packed": Case(sealed=200, dtype=torch.bfloat16, k=MIXED, v=grid(20, 3, 1, 32), rotary_dim=8),
}

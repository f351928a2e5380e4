"""The decode benchmark's problem: one layer's random latents and factors, and the keys and values that they mean.

Keys and values are made from latents, so that the uncompressed methods and ours read the same ones up to rounding, and
one softmax in fp32 is the truth for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from cskv.attention.inputs import AttentionInputs, Logits, Rotation, split_heads
from cskv.cache.positions import PositionTable
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.view import View
from cskv.models.cos_sin import FixedCosSin
from cskv.quantization.grid import Grid

KINDS = ("joint", "grouped", "commuting")
PER_HEAD = "grouped by head"
GROUPS = {"grouped": 4, PER_HEAD: 8}  # of kv heads
MIXED = 0  # in place of a number of bits: a quarter of the latents in 8 bits, half in 4, the others in 2
SINKS_ON_A_GPU = 4  # exact first tokens
WINDOW = GROUP = 32
ROOM = 256  # tokens that may be appended


@dataclass(frozen=True)
class Shape:
    """One attention layer, 8B-shaped unless told otherwise."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    density: float = 0.2  # share of the channels that is kept

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    def rank(self, kind: str) -> int:
        """Return the latents per token: a whole number per group, and whole pairs where factors commute with RoPE."""
        parts = {**GROUPS, "commuting": 2}.get(kind, 1)
        return round(self.density * self.kv_dim) // parts * parts

    def config(self) -> LlamaConfig:
        """Return the configuration of a model with one such layer."""
        return llama(self.q_heads, self.kv_heads, self.head_dim, num_hidden_layers=1)


def llama(heads: int, kv_heads: int, head_dim: int, **others: int) -> LlamaConfig:
    """Return the configuration of a Llama for long contexts."""
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return LlamaConfig(
        hidden_size=heads * head_dim, max_position_embeddings=131_072, rope_parameters=rope, **shape, **others
    )


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (batch, kv_heads, tokens, head_dim) by Llama's RoPE."""
    return heads * cos[:, None] + rotate_half(heads) * sin[:, None]


class Problem:
    """`tokens` cached tokens of `batch` sequences, and one more to come.

    Attributes:
        query: of the token to come, after RoPE.
        new: its latents of keys and of values, keys after RoPE, and values; every step appends them again, which
            changes no timing.
        cached: the same of the cached tokens; let go by `forget` once all caches are filled.
        factors, logits: of the layer.
        cos, sin: of all tokens that there may be.
        stub: what transformers' attention functions read of a module.
    """

    def __init__(
        self, kind: str, shape: Shape, tokens: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kind, self.shape, self.tokens, self.batch = kind, shape, tokens, batch
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(0)
        self.logits = Logits(shape.head_dim**-0.5)
        groups = shape.q_heads // shape.kv_heads
        self.stub = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)
        self.factors = LayerFactors(self._factors(kind), self._factors(kind if kind != "commuting" else "joint"))
        self._cos_sin, self._positions = FixedCosSin(LlamaRotaryEmbedding(shape.config()).to(device)), PositionTable()
        self._positions.append((torch.arange(tokens + ROOM, device=device)[None],))
        self.cos, self.sin = self.make_cos_sin(tokens + ROOM)
        k, v = (self._normal(batch, tokens + 1, part.rank) for part in (self.factors.k, self.factors.v))
        keys, values = self._rotated(self._heads(self.factors.k, k)), self._heads(self.factors.v, v)
        self.query = self._normal(batch, shape.q_heads, 1, shape.head_dim)
        parts = k, v, keys, values
        self.new = [part[..., tokens:, :].clone() for part in parts]
        self.cached = [part[..., :tokens, :] for part in parts]
        self._last_row = k[-1:].clone(), v[-1:].clone()

    def inputs(self, view: View) -> AttentionInputs:
        """Return what attention reads and is told beside the query."""
        rotation = None if self.kind == "commuting" else self.rotation(view.sealed, view.sinks)
        return AttentionInputs(view, self.factors, rotation, self.logits)

    def make_cos_sin(self, length: int) -> tuple[Tensor, Tensor]:
        """Make cos and sin of the first tokens anew, as the library does once per forward for all layers."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self._cos_sin.cos_sin(self._positions.read(0, length), like)

    def rotation(self, sealed: int, first: int = 0) -> Rotation:
        """Return the rotation of keys that were rebuilt from the latents of tokens from the first on."""
        cos, sin = (part[:, first : first + sealed] for part in (self.cos, self.sin))
        return Rotation(cos, sin, self._rotated_heads, is_plain=True, is_symmetric=True)

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the keys and values of all tokens."""
        return sum(part.nbytes for part in self.new[2:]) * (self.tokens + 1)

    def forget(self) -> None:
        """Let go of what only filling caches needs."""
        del self.cached

    def grids(self, bits: int) -> tuple[Grid | None, Grid | None]:
        """Return KIVI's layout of few-bit latents, or of `MIXED` widths; none at 16 bits."""
        if bits == 16:
            return None, None
        k, v = self.factors.k.rank, self.factors.v.rank
        if bits == MIXED:
            return Grid(_mixed(k), GROUP, 1), Grid(_mixed(v), 1, 32)
        return Grid.uniform(k, bits, (GROUP, 1)), Grid.uniform(v, bits, (1, 32))

    def truth(self) -> Tensor:
        """Attend to the exact keys and values of the last sequence in fp32: (q_heads, head_dim)."""
        return self.softmax(*self.rebuilt(*self._last_row))

    def rebuilt(self, k: Tensor, v: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Rebuild keys and values from latents of the tokens from the first on, in fp32."""
        factors = self.factors.to(dtype=torch.float32)
        return self._rotated(self._heads(factors.k, k.float()), first), self._heads(factors.v, v.float())

    def softmax(self, keys: Tensor, values: Tensor) -> Tensor:
        """Attend plainly with the last sequence's query in fp32: (q_heads, head_dim)."""
        query = self.query[-1].float().view(self.shape.kv_heads, -1, self.shape.head_dim)
        weights = torch.softmax(query @ keys[0].float().transpose(1, 2) * self.logits.scaling, dim=-1)
        return (weights @ values[0].float()).flatten(0, 1)

    def _rotated(self, heads: Tensor, first: int = 0) -> Tensor:
        """Commuting factors rebuild keys that are rotated already."""
        if self.kind == "commuting":
            return heads
        tokens = slice(first, first + heads.shape[2])
        cos, sin = (part[:, tokens].to(heads.dtype) for part in (self.cos, self.sin))
        return rotate(heads, cos, sin)

    def _rotated_heads(self, channels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(split_heads(channels, self.shape.head_dim), cos, sin)

    def _heads(self, factors: Factors, latents: Tensor) -> Tensor:
        return split_heads(factors.expand(latents), self.shape.head_dim).contiguous()

    def _factors(self, kind: str) -> Factors:
        """Orthogonal up-projections that give channels of variance 1. Latents are drawn, so `down` only has a shape."""
        rank, groups, kv_dim = self.shape.rank(kind), GROUPS.get(kind, 1), self.shape.kv_dim
        blocks = []
        for _ in range(groups):
            shape = (kv_dim // groups, rank // groups)
            noise = torch.randn(shape, generator=self._generator, device=self.device)
            blocks.append(torch.linalg.qr(noise).Q * (shape[0] / shape[1]) ** 0.5)
        down = torch.ones(rank, 1, dtype=self.dtype, device=self.device)
        return Factors(down, torch.cat(blocks).to(self.dtype))

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self.device, dtype=self.dtype)


def _mixed(rank: int) -> tuple[tuple[int, int], ...]:
    return (8, rank // 4), (4, rank // 2), (2, rank - rank // 4 - rank // 2)

"""The low-rank factors of one projection: K ~= up @ (down @ x) + bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A down- and an up-projection that stand for one key or value projection (paper, section 3.1).

    Attributes:
        down: (rank, hidden). Latents are `x @ down.T`; they are what the cache stores.
        up: (kv_dim, rank). Rebuilt channels, before any norm and RoPE, are `latents @ up.T + bias`.
        bias: (kv_dim,) or None: the projection's own bias. It costs no cache, so it is kept exactly.
    """

    down: Float[Tensor, "rank hidden"]
    up: Float[Tensor, "kv_dim rank"]
    bias: Float[Tensor, " kv_dim"] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def kv_dim(self) -> int:
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    def latents(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch rank"]:
        """The latents of a layer's input."""
        return torch.nn.functional.linear(x, self.down)

    def expand(self, latents: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch kv_dim"]:
        """The channels rebuilt from latents."""
        return torch.nn.functional.linear(latents, self.up, self.bias)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """The same factors on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return Factors(self.down.to(device=device, dtype=dtype), self.up.to(device=device, dtype=dtype), bias)


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one attention layer."""

    k: Factors
    v: Factors

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerFactors:
        """The same factors on another device or in another dtype."""
        return LayerFactors(self.k.to(device, dtype), self.v.to(device, dtype))

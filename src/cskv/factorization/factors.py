"""The low-rank factors of one projection: K ~= up @ (down @ x + down_bias) + bias.

With head groups, the kv heads are split into equal groups and each has factors of its own (Palu's G-LRD): `up` is block
diagonal, and only its blocks are kept. Less is saved per latent, but rebuilding costs `groups` times less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A down- and an up-projection that stand for one key or value projection (paper, section 3.1).

    Attributes:
        down: (rank, hidden). Latents are `x @ down.T`; they are what the cache stores. Commuting key factors read keys
            in place of x, (rank, kv_dim).
        up: (kv_dim, rank / groups). Rebuilt channels, before any norm and RoPE, are `latents @ up.T + bias`; with
            groups, each group's channels come from its own `rank / groups` latents.
        bias: (kv_dim,) or None: the projection's own bias and offset. It costs no cache, so it is kept exactly. Of
            commuting keys it is before RoPE: rotated as the keys are, it is subtracted before `down`, added after `up`.
        down_bias: (rank,) or None: minus the latents' mean, so that latents are centred, which few bits suit.
    """

    down: Float[Tensor, "rank hidden"]
    up: Float[Tensor, "kv_dim group_rank"]
    bias: Float[Tensor, " kv_dim"] | None = None
    down_bias: Float[Tensor, " rank"] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def groups(self) -> int:
        """Groups of kv heads with factors of their own; 1 where all heads share them."""
        return self.down.shape[0] // self.up.shape[1]

    @property
    def kv_dim(self) -> int:
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    def latents(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch rank"]:
        """Return the latents of a layer's input."""
        return torch.nn.functional.linear(x, self.down, self.down_bias)

    def expand(self, latents: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch kv_dim"]:
        """Rebuild the channels from latents."""
        if self.groups == 1:
            return torch.nn.functional.linear(latents, self.up, self.bias)
        parts = torch.einsum(
            "...gr,gcr->...gc", latents.unflatten(-1, (self.groups, -1)), self.up.unflatten(0, (self.groups, -1))
        )
        return parts.flatten(-2) if self.bias is None else parts.flatten(-2) + self.bias

    @classmethod
    def grouped(cls, parts: Sequence[Factors]) -> Factors:
        """Join the factors of groups of kv heads, in the order of their channels. All have the same rank."""
        biases = [part.bias for part in parts if part.bias is not None]
        down_biases = [part.down_bias for part in parts if part.down_bias is not None]
        return cls(
            down=torch.cat([part.down for part in parts]),
            up=torch.cat([part.up for part in parts]),
            bias=torch.cat(biases) if biases else None,
            down_bias=torch.cat(down_biases) if down_biases else None,
        )

    def clone(self) -> Factors:
        """Copy the factors, without gradients."""
        return self._each(lambda part: part.detach().clone())

    def aligned(self, multiple: int) -> Factors:
        """Align the rows of `up` to a multiple of bytes: kernels load them 16 bytes at a time."""
        step = max(1, multiple // self.up.element_size())
        padded = torch.nn.functional.pad(self.up, (0, -self.up.shape[1] % step))
        return Factors(self.down, padded[:, : self.up.shape[1]], self.bias, self.down_bias)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """Return the same factors on another device or in another dtype."""
        return self._each(lambda part: part.to(device=device, dtype=dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Factors:
        parts = (self.down, self.up, self.bias, self.down_bias)
        return Factors(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one attention layer."""

    k: Factors
    v: Factors

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerFactors:
        """Return the same factors on another device or in another dtype."""
        return LayerFactors(self.k.to(device, dtype), self.v.to(device, dtype))

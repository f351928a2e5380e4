"""All latents of a projection, from one eigendecomposition: factors of any rank are slices of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cskv.errors import ConfigError
from cskv.factorization.basis import ordered, scaled
from cskv.factorization.factors import Factors


@dataclass(frozen=True)
class Components:
    """Full-rank factors whose leading latents lose least.

    Attributes:
        factors: of full rank, fp32. With a `down_bias`, latents are centred.
        spectrum: (kv_dim,), fp64: the loss that each further latent saves, largest first. With head groups, a step of
            as many latents as there are groups is one of each group.
        sizes: how many latents are kept or dropped together, in the order of each group's latents: 2 for the pairs of
            commuting keys, otherwise 1.
        unit: the loss of a unit of squared error in a latent.
    """

    factors: Factors
    spectrum: Tensor
    sizes: tuple[int, ...]
    unit: float = 1.0

    def evened(self) -> Components:
        """Give all latents one further scale, at which `up` has columns of norm 1 on average.

        A gain in nats makes latents many times smaller than the channels that they rebuild: too small for float16, and
        for a learning rate.
        """
        scale = float(self.factors.up.double().square().sum(0).mean().sqrt())
        factors = scaled(self.factors, torch.full_like(self.factors.down[:, 0], scale))
        return replace(self, factors=factors, unit=self.unit / scale**2)

    def truncated(self, rank: int) -> Factors:
        """Return the factors of a rank, the means of their latents moved into the bias.

        Args:
            rank: latents to keep, from 1 to kv_dim. A last one in which no pair fits stays unused.

        Raises:
            ConfigError: the rank is out of range, or too small for any pair.
        """
        kept = ordered(self.factors, self._leading(rank // self.factors.groups).to(self.factors.down.device))
        if kept.down_bias is None:
            return kept
        return replace(kept, bias=kept.expand(kept.down_bias), down_bias=None)

    def _leading(self, rank: int) -> Tensor:
        """Return the indices of a group's leading latents."""
        channels = sum(self.sizes)
        if not 1 <= rank <= channels:
            raise ConfigError(f"rank is {rank}; expected 1 to {channels}, the projection's channels")
        kept: list[int] = []
        start = 0
        for size in self.sizes:
            if len(kept) + size <= rank:
                kept += range(start, start + size)
            start += size
        if not kept:
            raise ConfigError(f"rank {rank} keeps no pair of rotated channels; give at least 2")
        return torch.tensor(kept)

    @classmethod
    def grouped(cls, parts: Sequence[Components]) -> Components:
        """Join the components of head groups, in the order of their channels. All have the same size."""
        factors = Factors.grouped([part.factors for part in parts])
        return cls(factors, torch.stack([part.spectrum for part in parts], 1).flatten(), parts[0].sizes)

    def to(self, device: torch.device) -> Components:
        """Return the same components with their factors on another device."""
        return replace(self, factors=self.factors.to(device))

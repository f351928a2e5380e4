"""Key factors that commute with RoPE: complex principal components across kv heads, one frequency at a time.

RoPE multiplies the complex number kappa_h = k_(h,a) + i k_(h,b), (a, b) a pair of channels of kv head h, by the same
exp(i t theta_j) in every head. A complex mixing across heads within one frequency j therefore commutes with it: with
the Hermitian second moment C_j = E[kappa kappa^H] of size (kv_heads, kv_heads) and its leading eigenvectors V_j,

    z_j = V_j^H kappa_j        latents, already rotated
    kappa_j ~= V_j z_j         rebuilt, already rotated

so that nothing is rotated when old keys are read, whatever the RoPE variant, and a query can absorb V. A common phase
leaves C_j unchanged, so it may be taken before or after the rotation. Channels that RoPE leaves alone (partial
rotary) take ordinary principal components across all heads. The ranks are dealt out over frequencies by eigenvalue.

Compared with unconstrained PCA this gives up mixing between frequencies: more loss per latent, for a far
cheaper decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cskv.errors import ConfigError, DataError
from cskv.factorization.components import Components
from cskv.factorization.factors import Factors

LEAST_GAIN = 1e-4  # as a share of the largest


@dataclass(frozen=True)
class RopePairs:
    """Which channels of a head RoPE turns together.

    Attributes:
        real, imaginary: (pairs,): the channels whose k_real + i k_imaginary is multiplied by exp(i t theta).
        unrotated: the channels that are left alone.
    """

    real: Int[Tensor, " pairs"]
    imaginary: Int[Tensor, " pairs"]
    unrotated: Int[Tensor, " rest"]

    @property
    def head_dim(self) -> int:
        return 2 * len(self.real) + len(self.unrotated)


@dataclass(frozen=True)
class _Direction:
    """A direction that may be kept: orthonormal rows, (1 or 2, kv_dim), that make its latents and rebuild from them."""

    value: float
    down: Tensor

    @property
    def value_per_latent(self) -> float:
        return self.value / len(self.down)


def commuting_components(
    moment: Float[Tensor, "kv_dim kv_dim"], pairs: RopePairs, gain: Float[Tensor, " kv_dim"] | None = None
) -> Components:
    """Find factors that act on keys, before or after RoPE alike, at every rank: keys ~= up @ (down @ keys).

    Args:
        moment: E[k k^T] of the keys as RoPE gets them (after the norm where the family has one), heads laid end to end.
        pairs: the channels that RoPE turns together.
        gain: how much an error counts, by channel; equal within a pair. None counts all channels alike.

    Returns:
        components on the CPU, `down` and `up` of (kv_dim, kv_dim). The latents of a pair share its eigenvalue evenly.

    Raises:
        ConfigError: there is a single kv head.
        DataError: the moment is not finite or of another shape.
    """
    directions, weights = _directions(moment, pairs, gain)
    directions.sort(key=lambda direction: direction.value_per_latent, reverse=True)
    rows, sizes = torch.cat([own.down for own in directions]), [len(own.down) for own in directions]
    shares = [own.value_per_latent for own in directions for _ in own.down]
    factors = Factors((rows * weights).float().contiguous(), (rows / weights).T.float().contiguous())
    return Components(factors, torch.tensor(shares, dtype=torch.float64), tuple(sizes))


def _directions(moment: Tensor, pairs: RopePairs, gain: Tensor | None) -> tuple[list[_Direction], Tensor]:
    """All directions that may be kept, of the weighted keys, and the weights."""
    kv_dim, heads = moment.shape[0], moment.shape[0] // pairs.head_dim
    if moment.shape != (kv_dim, kv_dim) or kv_dim % pairs.head_dim or not torch.isfinite(moment).all():
        raise DataError(f"the keys' moment has shape {tuple(moment.shape)} or holds NaN; calibrate this model")
    if heads == 1:
        raise ConfigError("commuting key factors mix kv heads, and this model has one: there is nothing to shrink")
    weights = torch.ones(kv_dim, dtype=torch.float64) if gain is None else gain.detach().double().cpu()
    weights = weights.clamp(min=LEAST_GAIN * float(weights.max()))
    weighted = moment.detach().double().cpu() * torch.outer(weights, weights)
    return _pair_components(weighted, pairs, heads) + _unrotated_components(weighted, pairs, heads), weights


def _pair_components(moment: Tensor, pairs: RopePairs, heads: int) -> list[_Direction]:
    starts = torch.arange(heads) * pairs.head_dim
    components = []
    for a, b in zip(pairs.real.tolist(), pairs.imaginary.tolist(), strict=True):
        real, imaginary = starts + a, starts + b
        rr, ii = moment[real][:, real], moment[imaginary][:, imaginary]
        ir = moment[imaginary][:, real]
        values, vectors = torch.linalg.eigh(torch.complex(rr + ii, ir - ir.T))
        for value, vector in zip(values.tolist(), vectors.T, strict=True):
            rows = torch.zeros(2, moment.shape[0], dtype=torch.float64)
            rows[0, real], rows[0, imaginary] = vector.real, vector.imag
            rows[1, real], rows[1, imaginary] = -vector.imag, vector.real
            components.append(_Direction(max(value, 0.0), rows))
    return components


def _unrotated_components(moment: Tensor, pairs: RopePairs, heads: int) -> list[_Direction]:
    if not len(pairs.unrotated):
        return []
    channels = (torch.arange(heads)[:, None] * pairs.head_dim + pairs.unrotated).flatten()
    values, vectors = torch.linalg.eigh(moment[channels][:, channels])
    components = []
    for value, vector in zip(values.tolist(), vectors.T, strict=True):
        row = torch.zeros(1, moment.shape[0], dtype=torch.float64)
        row[0, channels] = vector
        components.append(_Direction(max(value, 0.0), row))
    return components

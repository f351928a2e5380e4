"""Key factors that commute with RoPE: complex principal components across kv heads, one frequency at a time.

RoPE multiplies the complex number kappa_h = k_(h,a) + i k_(h,b), (a, b) a pair of channels of kv head h, by the same
exp(i t theta_j) in every head. A complex mixing across heads within one frequency j therefore commutes with it: with
the Hermitian second moment C_j = E[kappa kappa^H] of size (kv_heads, kv_heads) and its leading eigenvectors V_j,

    z_j = V_j^H kappa_j        latents, already rotated
    kappa_j ~= V_j z_j         rebuilt, already rotated

so that nothing is rotated when old keys are read, whatever the RoPE variant, and a query can absorb V. A common phase
leaves C_j unchanged, so it may be taken before or after the rotation. Channels that RoPE leaves alone (partial
rotary) take ordinary principal components across all heads. The ranks are dealt out over frequencies by eigenvalue.

A constant mu that all keys share before RoPE, as the bias of Qwen2's projections, which is far larger than what varies,
costs no cache: of a key at position t the latents are those of k - R_t mu, and R_t mu is added to what is rebuilt, or
q . R_t mu to its score. It is the factors' bias.

Compared with unconstrained PCA this gives up mixing between frequencies: more loss per latent, for a far
cheaper decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cskv.errors import ConfigError, DataError
from cskv.factorization.components import Components
from cskv.factorization.factors import Factors
from cskv.factorization.pca import gain_and_inverse


@dataclass(frozen=True)
class RopePairs:
    """The channels of a head that RoPE rotates together.

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


def commuting_components(
    moment: Float[Tensor, "kv_dim kv_dim"],
    pairs: RopePairs,
    gain: Float[Tensor, "kv_dim kv_dim"] | None = None,
    mean: Float[Tensor, " kv_dim"] | None = None,
) -> Components:
    """Find factors that act on keys, before or after RoPE alike, at every rank: keys ~= up @ (down @ keys).

    With a mean, keys - R mean ~= up @ (down @ (keys - R mean)), R the rotation that the keys have had.

    Args:
        moment: E[k k^T] of the keys as RoPE gets them (after the norm where the family has one), heads laid end to end.
        pairs: the channels that RoPE turns together.
        gain: how much an error counts, symmetric and positive semi-definite; it commutes with RoPE (`commuting_part`).
            None counts all channels alike.
        mean: E[k] of the same keys before RoPE, to be left out of the latents; it becomes the bias. None leaves it in.

    Returns:
        components on the CPU, `down` and `up` of (kv_dim, kv_dim). The latents of a pair share its eigenvalue evenly.

    Raises:
        ConfigError: there is a single kv head.
        DataError: the moment is not finite or of another shape.
    """
    kv_dim, heads = moment.shape[0], moment.shape[0] // pairs.head_dim
    if moment.shape != (kv_dim, kv_dim) or kv_dim % pairs.head_dim or not torch.isfinite(moment).all():
        raise DataError(f"the keys' moment has shape {tuple(moment.shape)} or holds NaN; calibrate this model")
    if heads == 1:
        raise ConfigError("commuting key factors mix kv heads, and this model has one: there is nothing to shrink")
    moment = moment.detach().double().cpu()
    to_loss, from_loss = gain_and_inverse(gain, moment)
    if mean is not None:
        mean = mean.detach().double().cpu()
        moment = moment - torch.outer(mean, mean)
    weighted = to_loss @ moment @ to_loss
    found = [*_pair_directions(weighted, pairs, heads), *_unrotated_directions(weighted, pairs, heads)]
    found.sort(key=lambda direction: direction[0], reverse=True)
    rows = torch.cat([own for _, own in found])
    shares = torch.tensor([value for value, own in found for _ in own], dtype=torch.float64)
    bias = None if mean is None else mean.float()
    factors = Factors((rows @ to_loss).float().contiguous(), (from_loss @ rows.T).float().contiguous(), bias)
    return Components(factors, shares, tuple(len(own) for _, own in found))


def commuting_part(matrix: Float[Tensor, "kv_dim kv_dim"], pairs: RopePairs) -> Float[Tensor, "kv_dim kv_dim"]:
    """Return the part of a symmetric matrix that commutes with RoPE at every position: its mean over all rotations."""
    heads, found = matrix.shape[0] // pairs.head_dim, torch.zeros_like(matrix)
    for real, imaginary in zip(*(_channels(own, pairs, heads) for own in (pairs.real, pairs.imaginary)), strict=True):
        alike = (matrix[real][:, real] + matrix[imaginary][:, imaginary]) / 2
        turned = (matrix[imaginary][:, real] - matrix[real][:, imaginary]) / 2
        found[real[:, None], real], found[imaginary[:, None], imaginary] = alike, alike
        found[imaginary[:, None], real], found[real[:, None], imaginary] = turned, -turned
    rest = _channels(pairs.unrotated, pairs, heads).flatten()
    found[rest[:, None], rest] = matrix[rest][:, rest]
    return found


def _pair_directions(moment: Tensor, pairs: RopePairs, heads: int) -> Iterator[tuple[float, Tensor]]:
    """Yield the eigenvalue per latent and the two orthonormal rows, (2, kv_dim), of every complex component."""
    for real, imaginary in zip(*(_channels(own, pairs, heads) for own in (pairs.real, pairs.imaginary)), strict=True):
        rr, ii = moment[real][:, real], moment[imaginary][:, imaginary]
        ir = moment[imaginary][:, real]
        values, vectors = torch.linalg.eigh(torch.complex(rr + ii, ir - ir.T))
        for value, vector in zip(values.clamp(min=0).tolist(), vectors.T, strict=True):
            rows = torch.zeros(2, moment.shape[0], dtype=torch.float64)
            rows[0, real], rows[0, imaginary] = vector.real, vector.imag
            rows[1, real], rows[1, imaginary] = -vector.imag, vector.real
            yield value / 2, rows


def _unrotated_directions(moment: Tensor, pairs: RopePairs, heads: int) -> Iterator[tuple[float, Tensor]]:
    """Yield the eigenvalue and the row, (1, kv_dim), of every component of the channels that RoPE leaves alone."""
    channels = _channels(pairs.unrotated, pairs, heads).flatten()
    values, vectors = torch.linalg.eigh(moment[channels][:, channels])
    for value, vector in zip(values.clamp(min=0).tolist(), vectors.T, strict=True):
        row = torch.zeros(1, moment.shape[0], dtype=torch.float64)
        row[0, channels] = vector
        yield value, row


def _channels(of_head: Tensor, pairs: RopePairs, heads: int) -> Tensor:
    """Return channels of a head as those of all heads laid end to end, (channels, heads)."""
    return of_head[:, None] + torch.arange(heads) * pairs.head_dim

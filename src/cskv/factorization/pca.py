"""Low-rank factors by principal component analysis: the closed form of the paper's training objective.

For a layer with y = W x + b, the paper trains D and U of rank r to minimise E||y - y^||^2, y^ = U D x + offset. With
mu = E[y], C = Cov(y) and B the r leading eigenvectors of C, the minimum over all factors of that rank is reached by

    D = B^T W,   U = B,   offset = mu + B B^T (b - mu).

The offset costs no cache. With a gain G (symmetric, positive definite) the error that is minimised is E||G (y - y^)||^2
instead: B are the leading eigenvectors of G C G, D = B^T G W and U = G^-1 B.

Only C, of (kv_dim, kv_dim), is needed: one streaming pass over text, then a solve of seconds.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.errors import ConfigError, DataError
from cskv.factorization.factors import Factors

# A gain's smallest eigenvalue, as a share of its largest: channels that nobody reads must stay invertible.
LEAST_GAIN = 1e-4


def pca_factors(
    weight: Float[Tensor, "kv_dim hidden"],
    mean: Float[Tensor, " kv_dim"],
    moment: Float[Tensor, "kv_dim kv_dim"],
    rank: int,
    *,
    bias: Float[Tensor, " kv_dim"] | None = None,
    gain: Float[Tensor, "kv_dim kv_dim"] | None = None,
) -> Factors:
    """The factors of a rank that lose least of what the projection puts out.

    Args:
        weight: any floating dtype; computed in fp64 on its device.
        mean, moment: E[y] and E[y y^T] of the projection's output, bias included.
        rank: from 1 to kv_dim.
        bias: the projection's own bias.
        gain: how much an error counts, symmetric and positive semi-definite; None counts all channels alike.

    Returns:
        fp32 factors on the weight's device, with the offset as bias.

    Raises:
        ConfigError: the rank is out of range.
        DataError: a statistic, gain or weight is not finite or has another shape.
    """
    kv_dim = weight.shape[0]
    if not 1 <= rank <= kv_dim:
        raise ConfigError(f"rank is {rank}; expected 1 to {kv_dim}, the projection's channels")
    for name, tensor, shape in (("mean", mean, (kv_dim,)), ("moment", moment, (kv_dim, kv_dim))):
        if tuple(tensor.shape) != shape:
            raise DataError(
                f"the output's {name} has shape {tuple(tensor.shape)}; expected {shape}: calibrate this model"
            )
    weight, mean, moment = (tensor.detach().to(weight.device).double() for tensor in (weight, mean, moment))
    if not all(torch.isfinite(tensor).all() for tensor in (weight, mean, moment)):
        raise DataError("the weight or the output's statistics hold NaN or infinity; calibrate again")
    offset = torch.zeros_like(mean) if bias is None else bias.detach().double()
    to_loss, from_loss = _gain_and_inverse(gain, weight)
    basis = principal_axes(to_loss @ (moment - torch.outer(mean, mean)) @ to_loss, rank)
    down, up = basis.T @ to_loss, from_loss @ basis
    return Factors(
        down=(down @ weight).float().contiguous(),
        up=up.float().contiguous(),
        bias=(mean + up @ (down @ (offset - mean))).float(),
    )


def principal_axes(covariance: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """The leading eigenvectors of a covariance, orthonormal also where it is singular, largest eigenvalue first."""
    _, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors[:, -rank:].flip(1)


def spectrum(
    mean: Float[Tensor, " kv_dim"],
    moment: Float[Tensor, "kv_dim kv_dim"],
    gain: Float[Tensor, "kv_dim kv_dim"] | None = None,
) -> Float[Tensor, " kv_dim"]:
    """What each further latent saves of E||G (y - y^)||^2, largest first: the eigenvalues of G Cov(y) G, fp64."""
    covariance = moment.double() - torch.outer(mean.double(), mean.double())
    if gain is not None:
        to_loss, _ = _gain_and_inverse(gain, covariance)
        covariance = to_loss @ covariance @ to_loss
    return torch.linalg.eigvalsh((covariance + covariance.T) / 2).clamp(min=0).flip(0)


def _gain_and_inverse(gain: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if gain is None:
        identity = torch.eye(like.shape[0], dtype=torch.float64, device=like.device)
        return identity, identity
    gain = gain.detach().to(like.device).double()
    if gain.shape != (like.shape[0], like.shape[0]) or not torch.isfinite(gain).all():
        raise DataError(f"the gain has shape {tuple(gain.shape)} or holds NaN; expected {(like.shape[0],) * 2}, finite")
    values, vectors = torch.linalg.eigh((gain + gain.T) / 2)
    if values[-1] <= 0:
        raise DataError("the gain is zero: nothing that the projection puts out counts")
    values = values.clamp(min=LEAST_GAIN * float(values[-1]))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T

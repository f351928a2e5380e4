"""Low-rank factors by principal component analysis: the closed form of the paper's training objective.

For a layer with y = W x + b, the paper trains D and U of rank r to minimise E||y - y^||^2, y^ = U D x + offset. With
mu = E[y], C = Cov(y) and B the r leading eigenvectors of C, the minimum over all factors of that rank is reached by

    D = B^T W,   U = B,   offset = mu + B B^T (b - mu),

so that the factors of a lower rank are the leading latents of those of a higher one, about the same mean.
The offset costs no cache. With a gain G (symmetric, positive definite) the error that is minimised is E||G (y - y^)||^2
instead: B are the leading eigenvectors of G C G, D = B^T G W and U = G^-1 B.

Only C, of (kv_dim, kv_dim), is needed: one streaming pass over text, then a solve of seconds.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.errors import DataError
from cskv.factorization.components import Components
from cskv.factorization.factors import Factors

# A gain's smallest eigenvalue, as a share of its largest: channels that nobody reads must stay invertible.
LEAST_GAIN = 1e-4


def principal_components(
    weight: Float[Tensor, "kv_dim hidden"],
    mean: Float[Tensor, " kv_dim"],
    moment: Float[Tensor, "kv_dim kv_dim"],
    *,
    bias: Float[Tensor, " kv_dim"] | None = None,
    gain: Float[Tensor, "kv_dim kv_dim"] | None = None,
) -> Components:
    """Find the factors that lose least of what the projection puts out, at every rank.

    Args:
        weight: any floating dtype; computed in fp64 on its device.
        mean, moment: E[y] and E[y y^T] of the projection's output, bias included.
        bias: the projection's own bias.
        gain: how much an error counts, symmetric and positive semi-definite; None counts all channels alike.

    Returns:
        components on the weight's device with centred latents, and the eigenvalues of G Cov(y) G.

    Raises:
        DataError: a statistic, gain or weight is not finite or has another shape.
    """
    kv_dim = weight.shape[0]
    for name, tensor, shape in (("mean", mean, (kv_dim,)), ("moment", moment, (kv_dim, kv_dim))):
        if tuple(tensor.shape) != shape:
            raise DataError(
                f"the output's {name} has shape {tuple(tensor.shape)}; expected {shape}: calibrate this model"
            )
    weight, mean, moment = (tensor.detach().to(weight.device).double() for tensor in (weight, mean, moment))
    if not all(torch.isfinite(tensor).all() for tensor in (weight, mean, moment)):
        raise DataError("the weight or the output's statistics hold NaN or infinity; calibrate again")
    offset = torch.zeros_like(mean) if bias is None else bias.detach().double()
    to_loss, from_loss = gain_and_inverse(gain, weight)
    covariance = to_loss @ (moment - torch.outer(mean, mean)) @ to_loss
    # Orthonormal also where the covariance is singular.
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    basis = vectors.flip(1)
    down, up = basis.T @ to_loss, from_loss @ basis
    factors = Factors(
        down=(down @ weight).float().contiguous(),
        up=up.float().contiguous(),
        bias=mean.float(),
        down_bias=(down @ (offset - mean)).float(),
    )
    return Components(factors, values.clamp(min=0).flip(0).cpu(), (1,) * kv_dim)


def gain_and_inverse(gain: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a gain, its smallest eigenvalues raised to `LEAST_GAIN` of the largest, and its inverse, fp64.

    Args:
        gain: (kv_dim, kv_dim), or None for the identity.
        like: any tensor of (kv_dim, ...), on the device to compute on.

    Raises:
        DataError: the gain is zero, not finite or of another shape.
    """
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

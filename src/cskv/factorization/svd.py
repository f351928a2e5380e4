"""Low-rank factors of a weight by singular value decomposition, plain or activation-aware (paper, section 3.1).

W = B S V^T. The best rank-r approximation in the Frobenius norm keeps the r largest singular values (Eckart-Young).
They are split evenly, sqrt(S) to each side, so that both factors have entries of the same scale and train at one
learning rate: up = B_r sqrt(S_r), down = sqrt(S_r) V_r^T.

B and S come from the eigendecomposition of W W^T, which is only (kv_dim, kv_dim), and down = B_r^T W / sqrt(S_r). The
product up @ down is then B_r B_r^T W whatever the rounding of S, so a rank-deficient weight, or one with more rows than
columns, needs no special case, and at full rank W comes back to rounding.

Layer inputs have a few channels far larger than the rest. ASVD (arXiv 2312.05821, equation 5) scales input channel i by
s_i = (mean|x_i| + eps)^alpha, takes the SVD of W diag(s), and undoes the scale on the down-projection.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.errors import ConfigError, DataError
from cskv.factorization.factors import Factors

# Singular values below this share of the largest one are rounding: W W^T in fp64 resolves squares down to about 1e-16.
SMALLEST_SHARE = 1e-7


def svd_factors(
    weight: Float[Tensor, "kv_dim hidden"],
    rank: int,
    bias: Float[Tensor, " kv_dim"] | None = None,
    scale: Float[Tensor, " hidden"] | None = None,
) -> Factors:
    """Find the factors of a rank that minimise || (W - up @ down) diag(scale) ||_F.

    They are the truncated SVD of W diag(scale) with the scale undone on `down`. Since that SVD's right side is
    B^T W diag(scale) / S, undoing it leaves B^T W / S: nothing is divided by the scale, so zeros in it are harmless.

    Args:
        weight: any floating dtype and device; computed there in fp64.
        rank: from 1 to kv_dim.
        bias: the projection's own bias, kept exactly.
        scale: how much each input channel counts; None counts all alike.

    Returns:
        fp32 factors on the weight's device.

    Raises:
        ConfigError: the rank is out of range.
        DataError: the weight is not finite.
    """
    kv_dim = weight.shape[0]
    if not 1 <= rank <= kv_dim:
        raise ConfigError(f"rank is {rank}; expected 1 to {kv_dim}, the projection's channels")
    weight = weight.detach().double()
    if not torch.isfinite(weight).all():
        raise DataError(
            f"a ({kv_dim}, {weight.shape[1]}) projection weight holds NaN or infinity; check the base model"
        )
    scaled = weight if scale is None else weight * scale.to(weight)
    squares, vectors = torch.linalg.eigh(scaled @ scaled.T)  # ascending
    basis = vectors[:, -rank:].flip(1)
    singular = squares[-rank:].flip(0).clamp(min=0).sqrt()
    root = singular.clamp(min=max(SMALLEST_SHARE * float(singular[0]), torch.finfo(torch.float32).tiny)).sqrt()
    return Factors(
        down=(basis.T @ weight / root[:, None]).float().contiguous(),
        up=(basis * root).float().contiguous(),
        bias=None if bias is None else bias.detach().float().clone(),
    )


def asvd_factors(
    weight: Float[Tensor, "kv_dim hidden"],
    mean_abs: Tensor,
    rank: int,
    alpha: float = 0.5,
    eps: float = 1e-6,
    bias: Float[Tensor, " kv_dim"] | None = None,
) -> Factors:
    """Find the factors of a rank that minimise || (W - up @ down) diag(s) ||_F, s by the calibrated size of the inputs.

    Args:
        weight: any floating dtype and device; computed there in fp64.
        mean_abs: (hidden,), floating: mean |x| of each input channel over calibration tokens, at least 0.
        rank: from 1 to kv_dim.
        alpha: the exponent of the channel scale, at least 0.
        eps: added to mean |x|, so that a channel that was always 0 in calibration keeps a little weight.
        bias: the projection's own bias, kept exactly.

    Returns:
        fp32 factors on the weight's device.

    Raises:
        ConfigError: the rank, alpha or eps is out of range.
        DataError: the statistics do not fit the weight, or are negative or not finite.
    """
    for name, value in (("alpha", alpha), ("eps", eps)):
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"ASVD's {name} is {value}; expected a finite number, at least 0")
    if mean_abs.shape != weight.shape[1:]:
        raise DataError(
            f"ASVD statistics have shape {tuple(mean_abs.shape)}; expected one mean |x| for each of the "
            f"{weight.shape[1]} input channels: calibrate this base model"
        )
    mean_abs = mean_abs.detach().double()
    if not torch.isfinite(mean_abs).all() or (mean_abs < 0).any():
        raise DataError("ASVD statistics hold NaN, infinity or a negative mean |x|; calibrate again")
    return svd_factors(weight, rank, bias, scale=(mean_abs + eps) ** alpha)

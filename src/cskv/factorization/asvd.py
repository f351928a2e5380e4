"""Activation-aware SVD: low-rank factors that spend their rank on the input channels that are large (ASVD).

Layer inputs have a few channels far larger than the rest. ASVD (arXiv 2312.05821, equation 5, as the CSKV paper uses
it in section 3.1) scales input channel i by s_i = (mean|x_i| + eps)^alpha, takes the SVD of W diag(s), and undoes the
scale on the down-projection. It minimises || (W - up @ down) diag(s) ||_F. alpha = 0 is plain SVD.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.errors import ConfigError, DataError
from cskv.factorization.factors import Factors
from cskv.factorization.svd import svd_factors


def asvd_factors(
    weight: Float[Tensor, "kv_dim hidden"],
    mean_abs: Float[Tensor, " hidden"],
    rank: int,
    alpha: float = 0.5,
    eps: float = 1e-6,
    bias: Float[Tensor, " kv_dim"] | None = None,
) -> Factors:
    """Find the best factors of a rank when input channels count by their calibrated size.

    Args:
        weight: any floating dtype and device; computed there in fp64.
        mean_abs: mean |x| of each input channel over calibration tokens, at least 0.
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

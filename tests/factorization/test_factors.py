"""Factors as linear maps."""

from __future__ import annotations

import torch

from cskv.factorization.factors import Factors


def test_aligned_factors_are_the_same_with_rows_further_apart() -> None:
    factors = Factors(torch.randn(5, 4), torch.randn(6, 5), torch.randn(6))
    aligned = factors.aligned(16)
    assert aligned.up.stride() == (8, 1)  # 5 numbers of 4 bytes, and 3 that are not read
    assert torch.equal(aligned.up, factors.up)
    latents = torch.randn(2, 3, 5)
    assert torch.allclose(aligned.expand(latents), factors.expand(latents), atol=1e-6)

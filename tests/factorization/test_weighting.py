from __future__ import annotations

import pytest
import torch

from cskv.factorization.commuting import RopePairs
from cskv.factorization.weighting import before_norm, key_gain, value_gain


def test_a_pair_shares_the_mean_energy_of_its_queries() -> None:
    pairs = RopePairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    gain = key_gain(torch.tensor([1.0, 7.0, 9.0, 0.0, 8.0, 25.0]), pairs, head_dim=3)
    assert gain.tolist() == pytest.approx([2.0, 2.0, 3.0, 2.0, 2.0, 5.0])


def test_without_rope_every_channel_has_its_own() -> None:
    assert key_gain(torch.tensor([4.0, 9.0]), None, head_dim=2).tolist() == [2.0, 3.0]


def test_the_key_gain_predicts_the_logit_error_over_all_rotations() -> None:
    """E over positions of (q . R e)^2 for a key error e is |g e|^2 for one query head and one pair."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4000, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 0.5])
    pairs = RopePairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([], dtype=torch.long))
    gain = key_gain((queries**2).mean(0), pairs, head_dim=2)
    error = torch.tensor([0.3, -0.8], dtype=torch.float64)
    angles = torch.arange(0, 360).double().deg2rad()
    turned = torch.stack(
        [error[0] * angles.cos() - error[1] * angles.sin(), error[0] * angles.sin() + error[1] * angles.cos()]
    )
    logit_errors = (queries @ turned) ** 2
    assert float(logit_errors.mean()) == pytest.approx(float(((gain * error) ** 2).sum()), rel=1e-6)


def test_the_value_gain_is_the_output_error() -> None:
    """Two kv heads, two query heads each, every query head attends to one value: |G e|^2 sums the output errors."""
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(7, 4 * 3, generator=generator, dtype=torch.float64)
    gain = value_gain(output, num_kv_heads=2, head_dim=3)
    error = torch.randn(6, generator=generator, dtype=torch.float64)
    expected = sum(
        float((output[:, 3 * query : 3 * query + 3] @ error[3 * (query // 2) : 3 * (query // 2) + 3]).square().sum())
        for query in range(4)
    )
    assert float((gain @ error).square().sum()) == pytest.approx(expected)
    assert torch.allclose(gain, gain.T)
    assert gain[:3, 3:].abs().max() == 0


def test_a_gain_moves_through_a_norm_by_the_sizes_on_either_side() -> None:
    gain = before_norm(torch.tensor([1.0, 1.0, 2.0]), torch.diag(torch.tensor([4.0, 0.0, 1.0])), torch.eye(3))
    assert gain.tolist() == pytest.approx([0.5, 1.0, 2.0])

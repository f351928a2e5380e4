from __future__ import annotations

import pytest
import torch

from cskv.factorization import weighting
from cskv.factorization.commuting import RopePairs
from cskv.factorization.weighting import before_norm, fisher_gain, key_gain, mixed_moments, shrunk, value_gain


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


def test_shrinking_takes_a_share_off_what_is_beside_the_diagonal() -> None:
    found = shrunk(torch.tensor([[4.0, 1.0], [1.0, 2.0]]), 0.3)
    assert found.dtype == torch.float64
    assert found.flatten().tolist() == pytest.approx([4.0, 0.7, 0.7, 2.0])


def test_with_a_fisher_gain_squared_errors_are_nats() -> None:
    """F = [[5, 3], [3, 5]] has 8 along (1, 1) and 2 along (1, -1): the gain 2 and 1 there."""
    fisher = torch.tensor([[5.0, 3.0], [3.0, 5.0]])
    gain = fisher_gain(fisher)
    assert gain.flatten().tolist() == pytest.approx([1.5, 0.5, 0.5, 1.5])
    error = torch.tensor([0.3, -0.1], dtype=torch.float64)
    assert float((gain @ error).square().sum()) == pytest.approx(float(error @ fisher.double() @ error) / 2)


def test_a_direction_without_a_gradient_is_not_free() -> None:
    gain = fisher_gain(torch.diag(torch.tensor([2.0, 0.0, -1e-9])))
    least = weighting.LEAST_FISHER**0.5
    assert gain.diagonal().tolist() == pytest.approx([1.0, least, least])
    assert 0 < least < 0.1


def test_moments_are_mixed_about_a_common_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variances 3 and 1 about (0, 0), and a quarter of 1 and 2 about (4, 0), brought to the scale of the former.

    The mixture's mean is (1, 0). About it the first vary by 3 + 1 and 1, the second by 1 + 9 and 2: a scale of 5/12.
    """
    monkeypatch.setattr(weighting, "COHERENT", 0.25)
    mean, moment = torch.zeros(2).double(), torch.diag(torch.tensor([3.0, 1.0])).double()
    coherent_mean, coherent = torch.tensor([4.0, 0.0]).double(), torch.diag(torch.tensor([17.0, 2.0])).double()
    mixture, second = mixed_moments(mean, moment, coherent_mean, coherent)
    assert mixture.tolist() == [1.0, 0.0]
    spread = second - torch.outer(mixture, mixture)
    assert spread.flatten().tolist() == pytest.approx([3 + 0.25 * 10 * 5 / 12, 0.0, 0.0, 0.75 + 0.25 * 2 * 5 / 12])
    assert float(spread.trace()) == pytest.approx(5.0)


def test_a_text_without_gradients_keeps_its_own_moments() -> None:
    mean, moment = torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([3.0, 1.0])).double()
    mixture, second = mixed_moments(mean, moment, mean, torch.outer(mean, mean))
    assert mixture.tolist() == mean.tolist()
    assert torch.isfinite(second).all()

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cskv.errors import ConfigError, DataError
from cskv.factorization.svd import asvd_factors, svd_factors


def random_case(seed: int, kv_dim: int = 8, hidden: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(kv_dim, hidden, generator=generator), 10 * torch.rand(hidden, generator=generator)


def test_rank_one_keeps_the_row_whose_input_is_larger() -> None:
    # Scaled by sqrt(mean|x|) = (1, 10), the rows of diag(3, 1) have singular values 3 and 10: the second row wins.
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    factors = asvd_factors(weight, torch.tensor([1.0, 100.0]), 1, alpha=0.5, eps=0.0)
    torch.testing.assert_close(factors.up @ factors.down, torch.diag(torch.tensor([0.0, 1.0])))
    # sqrt(10) on each side of the scaled matrix, and the scale 10 undone on down.
    torch.testing.assert_close(factors.up.abs(), torch.tensor([[0.0], [10**0.5]]))
    torch.testing.assert_close(factors.down.abs(), torch.tensor([[0.0, 10**0.5 / 10]]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), kv_dim=st.integers(1, 16), hidden=st.integers(1, 16))
def test_full_rank_returns_the_weight(seed: int, kv_dim: int, hidden: int) -> None:
    weight, mean_abs = random_case(seed, kv_dim, hidden)
    factors = asvd_factors(weight, mean_abs, kv_dim)
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=1e-5, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_no_other_factors_are_better_in_the_scaled_norm(seed: int, rank: int) -> None:
    weight, mean_abs = random_case(seed)
    scale = (mean_abs + 1e-6) ** 0.5
    factors = asvd_factors(weight, mean_abs, rank)
    best = ((weight - factors.up @ factors.down) * scale).norm()
    plain = svd_factors(weight, rank)
    assert best <= ((weight - plain.up @ plain.down) * scale).norm() + 1e-4
    generator = torch.Generator().manual_seed(seed)
    for spread in (0.01, 0.1, 10.0):
        up = factors.up + spread * torch.randn(factors.up.shape, generator=generator)
        down = torch.linalg.pinv(up) @ weight  # the best down for this up, in any scaled norm
        assert best <= ((weight - up @ down) * scale).norm() + 1e-4


def test_alpha_zero_is_svd() -> None:
    weight, mean_abs = random_case(3)
    plain, aware = svd_factors(weight, 4), asvd_factors(weight, mean_abs, 4, alpha=0.0)
    torch.testing.assert_close(aware.up @ aware.down, plain.up @ plain.down)
    torch.testing.assert_close(aware.up.abs(), plain.up.abs())


def test_equal_channels_are_svd() -> None:
    weight, _ = random_case(4)
    plain, aware = svd_factors(weight, 3), asvd_factors(weight, torch.full((12,), 7.0), 3)
    torch.testing.assert_close(aware.up @ aware.down, plain.up @ plain.down)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_dead_channels_are_harmless(eps: float) -> None:
    weight, mean_abs = random_case(5)
    mean_abs[::2] = 0.0
    factors = asvd_factors(weight, mean_abs, 8, eps=eps)
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=1e-5, atol=5e-5)
    silent = asvd_factors(weight, torch.zeros(12), 3, eps=eps)
    assert torch.isfinite(silent.up).all()
    assert torch.isfinite(silent.down).all()


def test_statistics_of_another_model_are_refused() -> None:
    weight, _ = random_case(0)
    with pytest.raises(DataError, match=r"shape \(5,\); expected .* 12 input channels"):
        asvd_factors(weight, torch.ones(5), 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_statistics_that_are_no_means_are_refused(bad: float) -> None:
    weight, mean_abs = random_case(0)
    mean_abs[1] = bad
    with pytest.raises(DataError, match="NaN, infinity or a negative"):
        asvd_factors(weight, mean_abs, 2)


def test_a_negative_alpha_is_refused() -> None:
    weight, mean_abs = random_case(0)
    with pytest.raises(ConfigError, match="alpha is -1"):
        asvd_factors(weight, mean_abs, 2, alpha=-1.0)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cskv.errors import ConfigError, DataError
from cskv.factorization.svd import svd_factors

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_diagonal_weight_keeps_its_largest_entries_split_evenly() -> None:
    factors = svd_factors(torch.diag(torch.tensor([1.0, 9.0, 4.0])), 2)
    torch.testing.assert_close(factors.up @ factors.down, torch.diag(torch.tensor([0.0, 9.0, 4.0])))
    torch.testing.assert_close(factors.up.abs(), torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(factors.down.abs(), torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]]))


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_full_rank_returns_the_weight(shape: tuple[int, int], seed: int) -> None:
    weight = random_weight(shape, seed)
    factors = svd_factors(weight, shape[0])
    assert factors.down.shape == (shape[0], shape[1])
    assert factors.up.shape == (shape[0], shape[0])
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=1e-5, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000), data=st.data())
def test_the_error_is_the_discarded_singular_values(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, shape[0]))
    weight = random_weight(shape, seed)
    factors = svd_factors(weight, rank)
    discarded = torch.linalg.svdvals(weight)[rank:].square().sum()
    error = (weight - factors.up @ factors.down).square().sum()
    torch.testing.assert_close(error, discarded, rtol=1e-3, atol=1e-6 * float(weight.square().sum()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_no_other_factors_of_the_rank_are_better(seed: int, rank: int) -> None:
    weight = random_weight((8, 12), seed)
    factors = svd_factors(weight, rank)
    best = (weight - factors.up @ factors.down).norm()
    # The strongest rivals: a random column space with the best `down` for it, near the optimum and far from it.
    for spread in (0.01, 0.1, 10.0):
        up = factors.up + spread * random_weight((8, rank), seed + 1)
        down = torch.linalg.pinv(up) @ weight
        assert best <= (weight - up @ down).norm() + 1e-5


def test_both_factors_carry_the_same_share_of_each_singular_value() -> None:
    factors = svd_factors(random_weight((16, 40)), 5)
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1))
    torch.testing.assert_close(factors.up.norm(dim=0) ** 2, torch.linalg.svdvals(random_weight((16, 40)))[:5])


def test_the_bias_is_kept_and_the_factors_are_fp32() -> None:
    weight, bias = random_weight((6, 10)).bfloat16(), torch.arange(6.0).bfloat16()
    factors = svd_factors(weight, 6, bias)
    assert factors.down.dtype == factors.up.dtype == factors.bias.dtype == torch.float32
    torch.testing.assert_close(factors.bias, torch.arange(6.0))
    x = random_weight((3, 10), 1)
    torch.testing.assert_close(factors.expand(factors.latents(x)), x @ weight.float().T + bias.float())


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(4, 6), torch.eye(4, 6) * 1e-12])
def test_rank_deficient_and_tiny_weights_stay_finite(weight: torch.Tensor) -> None:
    factors = svd_factors(weight, 4)
    assert torch.isfinite(factors.down).all()
    assert torch.isfinite(factors.up).all()
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=1e-5, atol=1e-6 * float(weight.abs().max()))


def test_gradients_do_not_reach_the_base_weight() -> None:
    factors = svd_factors(torch.nn.Parameter(random_weight((4, 4))), 2, torch.nn.Parameter(torch.zeros(4)))
    assert not factors.down.requires_grad
    assert not factors.up.requires_grad
    assert not factors.bias.requires_grad


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank is {rank}; expected 1 to 4"):
        svd_factors(random_weight((4, 9)), rank)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinity"):
        svd_factors(torch.full((2, 2), float("nan")), 1)

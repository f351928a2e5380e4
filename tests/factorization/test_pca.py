"""PCA factors: the smallest loss of their rank, whatever the covariance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskv import ConfigError, DataError, Factors
from cskv.factorization.pca import principal_components
from cskv.factorization.svd import asvd_factors, svd_factors

HIDDEN, KV_DIM, TOKENS = 12, 8, 400


def problem(seed: int, biased: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """A weight, a bias and correlated layer inputs with a mean."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(KV_DIM, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(KV_DIM, generator=generator, dtype=torch.float64) if biased else None
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64) @ mixing + 2.0
    return weight, bias, x


def statistics(weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.nn.functional.linear(x, weight, bias)
    return y, y.mean(0), y.T @ y / len(y)


def pca_factors(weight: Tensor, mean: Tensor, moment: Tensor, rank: int, **kwargs: Tensor | None) -> Factors:
    return principal_components(weight, mean, moment, **kwargs).truncated(rank)


def spectrum(mean: Tensor, moment: Tensor, gain: Tensor | None = None) -> Tensor:
    return principal_components(torch.eye(len(mean)), mean, moment, gain=gain).spectrum


def loss(factors: Factors, x: Tensor, y: Tensor, gain: Tensor | None = None) -> float:
    factors = factors.to(dtype=torch.float64)
    error = y - factors.expand(factors.latents(x))
    return float(((error if gain is None else error @ gain) ** 2).sum(1).mean())


@given(st.integers(0, 10_000), st.integers(1, KV_DIM), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_loss_is_the_sum_of_the_eigenvalues_left_out(seed: int, rank: int, biased: bool) -> None:
    weight, bias, x = problem(seed, biased)
    y, mean, moment = statistics(weight, bias, x)
    values = spectrum(mean, moment)
    factors = pca_factors(weight, mean, moment, rank, bias=bias)
    assert loss(factors, x, y) == pytest.approx(float(values[rank:].sum()), rel=1e-4, abs=1e-5 * float(values.sum()))


@given(st.integers(0, 10_000), st.integers(1, KV_DIM - 1))
@settings(max_examples=25, deadline=None)
def test_nothing_of_the_same_rank_loses_less(seed: int, rank: int) -> None:
    weight, bias, x = problem(seed)
    y, mean, moment = statistics(weight, bias, x)
    best = loss(pca_factors(weight, mean, moment, rank, bias=bias), x, y)
    generator = torch.Generator().manual_seed(seed)
    other = Factors(
        torch.randn(rank, HIDDEN, generator=generator), torch.randn(KV_DIM, rank, generator=generator), bias
    )
    for rival in (
        svd_factors(weight, rank, bias),
        asvd_factors(weight, x.abs().mean(0), rank, bias=bias),
        other,
    ):
        assert best <= loss(rival, x, y) * (1 + 1e-6)


def test_gradient_descent_does_not_get_below() -> None:
    weight, bias, x = problem(3)
    y, mean, moment = statistics(weight, bias, x)
    start = pca_factors(weight, mean, moment, 3, bias=bias)
    tensors = [t.double().clone().requires_grad_() for t in (start.down, start.up, start.bias)]
    optimizer = torch.optim.LBFGS(tensors, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = ((y - Factors(*tensors).expand(Factors(*tensors).latents(x))) ** 2).sum(1).mean()
        value.backward()
        return value

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() >= before * (1 - 1e-3)


def test_hand_computed_example() -> None:
    """y = x, variances 4 and 1, mean (0, 3): one latent keeps the first channel, the offset the second's mean."""
    mean = torch.tensor([0.0, 3.0])
    moment = torch.tensor([[4.0, 0.0], [0.0, 10.0]])
    factors = pca_factors(torch.eye(2), mean, moment, 1)
    assert torch.allclose(factors.down.abs(), torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(factors.expand(factors.latents(torch.tensor([[5.0, 9.0]]))), torch.tensor([[5.0, 3.0]]))
    assert torch.allclose(spectrum(mean, moment), torch.tensor([4.0, 1.0], dtype=torch.float64))


def test_a_gain_turns_the_choice_around() -> None:
    mean, moment = torch.zeros(2), torch.diag(torch.tensor([4.0, 1.0]))
    factors = pca_factors(torch.eye(2), mean, moment, 1, gain=torch.diag(torch.tensor([1.0, 3.0])))
    assert torch.allclose(factors.expand(factors.latents(torch.tensor([[5.0, 7.0]]))), torch.tensor([[0.0, 7.0]]))


@given(st.integers(0, 10_000), st.integers(1, KV_DIM - 1))
@settings(max_examples=25, deadline=None)
def test_with_a_gain_the_weighted_loss_is_the_smallest(seed: int, rank: int) -> None:
    weight, bias, x = problem(seed)
    y, mean, moment = statistics(weight, bias, x)
    root = torch.randn(KV_DIM, KV_DIM, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    gain = root @ root.T + torch.eye(KV_DIM, dtype=torch.float64)
    weighted = loss(pca_factors(weight, mean, moment, rank, bias=bias, gain=gain), x, y, gain)
    assert weighted <= loss(pca_factors(weight, mean, moment, rank, bias=bias), x, y, gain) * (1 + 1e-6)
    expected = float(spectrum(mean, moment, gain)[rank:].sum())
    assert weighted == pytest.approx(expected, rel=1e-3, abs=1e-5 * float(spectrum(mean, moment, gain).sum()))


@pytest.mark.parametrize("biased", [False, True])
def test_full_rank_gives_the_projection_back(biased: bool) -> None:
    weight, bias, x = problem(5, biased)
    y, mean, moment = statistics(weight, bias, x)
    factors = pca_factors(weight, mean, moment, KV_DIM, bias=bias)
    assert torch.allclose(factors.expand(factors.latents(x.float())), y.float(), atol=1e-4)


def degenerate() -> dict[str, Tensor]:
    few = problem(1)[2][:3]
    constant = problem(1)[2].clone()
    constant[:] = constant[0]
    return {
        "fewer tokens than channels": few,
        "constant outputs": constant,
        "zero outputs": torch.zeros(TOKENS, HIDDEN, dtype=torch.float64),
        "ill-conditioned": problem(1)[2] * torch.logspace(-12, 6, HIDDEN, dtype=torch.float64),
    }


@pytest.mark.parametrize("case", list(degenerate()))
@pytest.mark.parametrize("rank", [1, 5, KV_DIM])
def test_degenerate_covariances_give_finite_factors_and_the_least_loss(case: str, rank: int) -> None:
    weight, bias, _ = problem(1)
    x = degenerate()[case]
    y, mean, moment = statistics(weight, bias, x)
    factors = pca_factors(weight, mean, moment, rank, bias=bias)
    assert all(torch.isfinite(t).all() for t in (factors.down, factors.up, factors.bias))
    left_out = float(spectrum(mean, moment)[rank:].sum())
    assert loss(factors, x, y) <= left_out * 1.001 + 1e-6 * float(moment.trace())


@pytest.mark.parametrize("rank", [0, KV_DIM + 1])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    weight, _, x = problem(0)
    _, mean, moment = statistics(weight, None, x)
    with pytest.raises(ConfigError, match=f"rank is {rank}; expected 1 to {KV_DIM}"):
        pca_factors(weight, mean, moment, rank)


def test_statistics_of_another_shape_or_that_are_no_numbers_are_refused() -> None:
    weight, _, x = problem(0)
    _, mean, moment = statistics(weight, None, x)
    with pytest.raises(DataError, match=r"mean has shape \(7,\)"):
        pca_factors(weight, mean[:7], moment, 2)
    with pytest.raises(DataError, match="NaN"):
        pca_factors(weight, mean, moment * float("nan"), 2)
    with pytest.raises(DataError, match="gain is zero"):
        pca_factors(weight, mean, moment, 2, gain=torch.zeros(KV_DIM, KV_DIM))

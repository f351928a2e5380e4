from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.attention.int8_keys import Int8Keys, rounded
from cskv.factorization.factors import Factors


def test_rows_become_whole_numbers_of_their_largest() -> None:
    whole, steps = rounded(torch.tensor([[254.0, -129.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    assert whole.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0]]  # halves go to the even one
    assert steps.tolist() == [[2.0], [0.0]]


def factors(up: Tensor, down: Tensor | None = None) -> Factors:
    """Factors whose latents need no balance, unless the down-projection is given."""
    groups = 1 if down is None else down.shape[0] // up.shape[1]
    down = up.norm(dim=0)[:, None] if down is None else down
    assert down.shape[0] == groups * up.shape[1]
    return Factors(down, up)


def test_keys_are_products_of_whole_numbers() -> None:
    """U = ((1, 0.5), (0, -2)) is ((127, 64), (0, -127)); latents (1, -1) are (127, -127), (0.25, 1) are (32, 127)."""
    keys = Int8Keys.of(factors(torch.tensor([[1.0, 0.5], [0.0, -2.0]])))
    assert keys.up.shape == (2, 16)
    assert not keys.up[:, 2:].any()
    first = [(127 * 127 - 64 * 127) / 127**2, 127 * 127 * 2 / 127**2]
    second = [(32 * 127 + 127 * 64) / 127**2, -127 * 127 * 2 / 127**2]
    found = keys.channels(torch.tensor([[[1.0, -1.0], [0.25, 1.0]]]))
    assert found[0].flatten().tolist() == pytest.approx(first + second)


def test_latents_of_unlike_size_keep_their_digits() -> None:
    """The second latents are a hundredth of the first, by the rows that make them: balanced, both keep 8 bits."""
    draw = torch.Generator().manual_seed(0)
    up, x = torch.randn(64, 2, generator=draw), torch.randn(1, 50, 2, generator=draw)
    down = torch.diag(torch.tensor([100.0, 1.0]))
    latents, exact = x @ down.T, (x @ down.T) @ up.T
    errors = [
        float((Int8Keys.of(factors(up, rows)).channels(latents) - exact).norm() / exact.norm())
        for rows in (down, torch.eye(2))
    ]
    assert Int8Keys.of(factors(up, down)).balance.tolist() == pytest.approx((up.norm(dim=0) / down.norm(dim=1)).sqrt())
    assert errors[0] < errors[1]


def test_a_latent_that_nothing_makes_or_reads_is_no_division_by_zero() -> None:
    up = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 2.0]])
    down = torch.tensor([[1.0], [1.0], [0.0]])
    found = Int8Keys.of(factors(up, down)).channels(torch.tensor([[[3.0, 5.0, 0.0]]]))
    assert found.flatten().tolist() == pytest.approx([3.0, 3.0], rel=0.02)


def test_groups_have_latents_and_steps_of_their_own() -> None:
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 3, generator=draw), torch.randn(6, 5, generator=draw)
    latents = torch.randn(2, 5, 6, generator=draw) * torch.tensor([1.0] * 3 + [100.0] * 3)
    found = Int8Keys.of(factors(up, down)).channels(latents)
    for group in range(2):
        rows, own = slice(4 * group, 4 * group + 4), slice(3 * group, 3 * group + 3)
        alone = Int8Keys.of(factors(up[rows], down[own])).channels(latents[..., own])
        assert torch.equal(found[..., rows], alone)


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_error_is_at_most_half_a_step_of_each(rank: int, seed: int, size: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    up, latents = torch.randn(6, rank, generator=draw).double(), size * torch.randn(1, 4, rank, generator=draw).double()
    keys = Int8Keys.of(factors(up.float()))
    error = (keys.channels(latents.float()).double() - latents @ up.T).abs()
    half_up, half_latents = up.abs().amax(1) / 254, latents.abs().amax(2, keepdim=True) / 254
    bound = half_latents * up.abs().sum(1) + latents.abs().sum(2, keepdim=True) * half_up
    bound += rank * half_latents * half_up
    assert (error <= 1.001 * bound).all()

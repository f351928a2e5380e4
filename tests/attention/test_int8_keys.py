from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv.attention.int8_keys import Int8Keys, rounded


def test_rows_become_whole_numbers_of_their_largest() -> None:
    whole, steps = rounded(torch.tensor([[254.0, -129.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    assert whole.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0]]  # halves go to the even one
    assert steps.tolist() == [[2.0], [0.0]]


def test_keys_are_products_of_whole_numbers() -> None:
    """U = ((1, 0.5), (0, -2)) is ((127, 64), (0, -127)); latents (1, -1) are (127, -127), (0.25, 1) are (32, 127)."""
    keys = Int8Keys.of(torch.tensor([[1.0, 0.5], [0.0, -2.0]]))
    assert keys.up.shape == (2, 16)
    assert not keys.up[:, 2:].any()
    first = [(127 * 127 - 64 * 127) / 127**2, 127 * 127 * 2 / 127**2]
    second = [(32 * 127 + 127 * 64) / 127**2, -127 * 127 * 2 / 127**2]
    found = keys.channels(torch.tensor([[[1.0, -1.0], [0.25, 1.0]]]))
    assert found[0].flatten().tolist() == pytest.approx(first + second)


def test_groups_have_latents_and_steps_of_their_own() -> None:
    up = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0] * 3 + [100.0] * 3)
    found = Int8Keys.of(up).channels(latents)
    for group in range(2):
        alone = Int8Keys.of(up[4 * group : 4 * group + 4]).channels(latents[..., 3 * group : 3 * group + 3])
        assert torch.equal(found[..., 4 * group : 4 * group + 4], alone)


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_error_is_at_most_half_a_step_of_each(rank: int, seed: int, size: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    up, latents = torch.randn(6, rank, generator=draw).double(), size * torch.randn(1, 4, rank, generator=draw).double()
    keys = Int8Keys.of(up.float())
    error = (keys.channels(latents.float()).double() - latents @ up.T).abs()
    half_up, half_latents = up.abs().amax(1) / 254, latents.abs().amax(2, keepdim=True) / 254
    bound = (
        half_latents * up.abs().sum(1) + latents.abs().sum(2, keepdim=True) * half_up + rank * half_latents * half_up
    )
    assert (error <= 1.001 * bound).all()

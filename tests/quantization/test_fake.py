"""The grid with gradients: forward the stored values bit for bit, backward the derivative with rounding as identity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv.quantization.fake import read_back
from cskv.quantization.grid import Grid, dequantise, quantise

GRIDS = [
    Grid.uniform(7, 4, (8, 1)),
    Grid.uniform(7, 2, (1, 4)),
    Grid.uniform(7, 3, (1, 7)),
    Grid(((8, 2), (2, 5)), 4, 2),
]


def random(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


@pytest.mark.parametrize("grid", GRIDS)
@given(length=st.integers(1, 20), seed=st.integers(0, 2**31), offset=st.sampled_from([0.0, 4.0, -4.0]))
def test_forward_is_what_the_cache_reads(grid: Grid, length: int, seed: int, offset: float) -> None:
    latents = random(2, length, 7, seed=seed, offset=offset)
    assert torch.equal(read_back(latents, grid), dequantise(*quantise(latents, grid), grid))


def test_without_a_grid_latents_are_as_they_were() -> None:
    latents = random(1, 3, 7)
    assert read_back(latents, None) is latents


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_those_of_the_surrogate(grid: Grid) -> None:
    """x^ = x + scale * r with r held, and the scale (max - min) / levels: differentiated by autograd instead."""
    latents = random(2, 11, 7, offset=1.0).requires_grad_()
    weight = random(2, 11, 7, seed=1)
    (read_back(latents, grid) * weight).sum().backward()

    again = latents.detach().clone().requires_grad_()
    channels = torch.tensor(grid.block_of)
    levels = torch.cat([torch.full((n,), 2.0**bits - 1) for bits, n in grid.widths])
    surrogate = []
    for start in range(0, 11, grid.block_tokens):
        rows = again[:, start : start + grid.block_tokens]
        stored = quantise(rows.detach(), grid)
        step, read = stored.scales.float()[:, :1, channels], dequantise(*stored, grid)
        spread = torch.stack(
            [
                rows[..., channels == block].amax((1, 2)) - rows[..., channels == block].amin((1, 2))
                for block in range(grid.channel_blocks)
            ],
            dim=-1,
        )
        residual = (read - rows.detach()) / step
        surrogate.append(rows + spread[:, None, channels] / levels * residual)
    (torch.cat(surrogate, dim=1) * weight).sum().backward()
    torch.testing.assert_close(latents.grad, again.grad, rtol=1e-4, atol=1e-5)


def test_the_extremes_have_gradients() -> None:
    """The official code zeroes them."""
    latents = torch.tensor([0.0, 1, 2, 6])[None, :, None].requires_grad_()
    read = read_back(latents, Grid.uniform(1, 2, (4, 1)))
    read.sum().backward()
    # Codes 0, 0, 1, 3 of 0, 1/2, 1, 3: r = 0, -1/2, 0, 0, whose sum over 3 levels goes to the maximum, not the minimum.
    assert latents.grad.flatten().tolist() == pytest.approx([1 + 1 / 6, 1, 1, 1 - 1 / 6])


def test_constant_blocks_have_the_gradient_of_the_identity() -> None:
    latents = torch.full((1, 4, 2), 3.0, requires_grad=True)
    read_back(latents, Grid.uniform(2, 4, (4, 2))).sum().backward()
    assert torch.equal(latents.grad, torch.ones(1, 4, 2))

"""The grid: hand-computed groups, error bounds on every kind of value, and hard values that must survive."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv import ConfigError, CSKVConfig
from cskv.latents.pages import PageLayout
from cskv.quantization.grid import Grid, dequantise, quantise


def stored(latents: Tensor, grid: Grid) -> Tensor:
    return dequantise(*quantise(latents, grid), grid)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, :, None]


def test_a_group_by_hand() -> None:
    quantised = quantise(column(0, 1, 2, 6), Grid.uniform(1, 2, (4, 1)))
    assert quantised.payload.flatten().tolist() == [0, 0, 1, 3]  # 1 / 2 rounds to even
    assert (quantised.minima.item(), quantised.scales.item()) == (0, 2)
    assert dequantise(*quantised, Grid.uniform(1, 2, (4, 1))).flatten().tolist() == [0, 0, 2, 6]


def test_values_that_share_a_sign_keep_all_levels() -> None:
    """The official code clamps the zero point, and gives 2, 2, 2, 2."""
    read = stored(column(10, 10.5, 11, 12), Grid.uniform(1, 2, (4, 1)))
    assert torch.allclose(read.flatten(), torch.tensor([10, 10.67, 10.67, 12]), atol=0.02)


def test_blocks_have_parameters_of_their_own() -> None:
    latents = torch.tensor([[0.0, 30, 100], [3, 0, 100], [0, 0, 7], [0, 0, 7]])[None]
    quantised = quantise(latents, Grid.uniform(3, 2, (2, 2)))
    assert quantised.minima[0].tolist() == [[0, 100], [0, 7]]
    assert quantised.scales[0].tolist() == [[10, 0], [0, 0]]
    assert dequantise(*quantised, Grid.uniform(3, 2, (2, 2)))[0, 0].tolist() == [0, 30, 100]


def test_runs_of_widths_are_independent() -> None:
    latents = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(0))
    mixed = Grid(((8, 3), (3, 9)), 5, 4)
    alone = [stored(latents[..., :3], Grid.uniform(3, 8, (5, 4))), stored(latents[..., 3:], Grid.uniform(9, 3, (5, 4)))]
    assert torch.equal(stored(latents, mixed), torch.cat(alone, dim=-1))
    assert quantise(latents, mixed).payload.shape == (2, 10, mixed.row_bytes) == (2, 10, 3 + 3 + 2)
    assert quantise(latents, mixed).scales.shape == (2, 2, mixed.channel_blocks) == (2, 2, 1 + 3)


def test_runs_by_hand() -> None:
    """3 codes of 8 bits are 3 bytes; 9 of 3 bits are 3 of two bits and 2 of one. Blocks of 4 channels: 1 and 3."""
    grid = Grid(((8, 3), (3, 9)), 5, 4)
    assert grid.runs == ((8, slice(0, 3), slice(0, 3)), (3, slice(3, 12), slice(3, 8)))
    assert (grid.rank, grid.row_bytes, grid.channel_blocks) == (12, 8, 4)


def test_grids_are_told_apart_by_their_settings_alone() -> None:
    grid = Grid(((8, 3), (3, 9)), 5, 4)
    for same in (Grid(((8, 3), (3, 9)), 5, 4), replace(Grid(((8, 3), (3, 9)), 5, 1), block_channels=4)):
        assert (same, hash(same), repr(same)) == (
            grid,
            hash(grid),
            "Grid(widths=((8, 3), (3, 9)), block_tokens=5, block_channels=4)",
        )
        assert same.channel_blocks == 4
    assert pickle.loads(pickle.dumps(grid)).runs == grid.runs  # servers send grids from process to process
    assert replace(grid, block_tokens=1) != grid


@pytest.mark.parametrize(
    ("grid", "dtype", "size"),
    [
        (None, torch.bfloat16, 64.0),
        (None, torch.float32, 128.0),
        (Grid.uniform(32, 4, (32, 1)), torch.bfloat16, 20.0),  # 16 of codes, and 4 bytes per 32 tokens and channel
        (Grid.uniform(32, 3, (1, 32)), torch.float32, 16.0),  # 12 of codes, and 4 per token
    ],
)
def test_bytes_of_a_token_by_hand(grid: Grid | None, dtype: torch.dtype, size: float) -> None:
    assert PageLayout(32, 32, dtype, grid, grid).bytes_per_token == 2 * size


def test_bits_per_latent_count_the_parameters() -> None:
    assert Grid.uniform(32, 4, (32, 1)).bits_per_latent == 5  # a minimum and a scale of 16 bits per 32 values
    assert Grid.uniform(64, 4, (32, 4)).bits_per_latent == 4.25


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -7.3, 1e4, -1e4, 1e-8, -1e-8, 1e30])
def test_constant_groups_survive(value: float, bits: int) -> None:
    read = stored(torch.full((1, 32, 5), value), Grid.uniform(5, bits, (32, 1)))
    assert torch.allclose(read, torch.full((1, 32, 5), value), rtol=2**-8 / (2**bits - 1), atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_huge_and_tiny_groups_lose_no_more_than_others(scale: float, offset: float) -> None:
    latents = torch.randn(1, 32, 8, generator=torch.Generator().manual_seed(1)) + offset
    grid = Grid.uniform(8, 4, (32, 1))
    plain, scaled = stored(latents, grid), stored(latents * scale, grid) / scale
    error, scaled_error = ((read - latents).square().mean().sqrt() for read in (plain, scaled))
    assert torch.isfinite(scaled).all()
    assert scaled_error < 1.05 * error


@given(
    st.integers(2, 8), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 13),
    st.sampled_from([1e-8, 1e-3, 1.0, 1e4]), st.floats(-5, 5), st.integers(0, 2**31),
)  # fmt: skip
def test_no_value_is_off_by_more_than_half_a_step(
    bits: int, tokens: int, channels: int, length: int, rank: int, scale: float, offset: float, seed: int
) -> None:
    latents = scale * (torch.randn(2, length, rank, generator=torch.Generator().manual_seed(seed)) + offset)
    grid = Grid.uniform(rank, bits, (tokens, channels))
    quantised = quantise(latents, grid)
    rows, columns = torch.arange(length) // tokens, torch.tensor(grid.block_of)
    step = quantised.scales.float()[:, rows][..., columns]
    error = (dequantise(*quantised, grid) - latents).abs()
    assert (error <= 0.5 * step * (1 + 1e-4) + 1e-6 * latents.abs()).all()
    # And the steps are no larger than the spread asks for, but for the rounding of minimum and scale to bfloat16.
    widest = latents.amax() - latents.amin() + latents.abs().amax() * 2**-7
    assert (step <= widest / (2**bits - 1) * (1 + 2**-6)).all()


@given(st.integers(1, 40), st.integers(2, 8))
def test_storing_again_changes_little(length: int, bits: int) -> None:
    grid = Grid.uniform(5, bits, (8, 2))
    once = stored(torch.randn(1, length, 5, generator=torch.Generator().manual_seed(length)), grid)
    step = quantise(once, grid).scales.float().amax()
    assert (stored(once, grid) - once).abs().max() <= 0.5 * step * (1 + 1e-4)


@pytest.mark.parametrize("widths", [(), ((0, 4),), ((9, 4),), ((4, 0),)])
def test_impossible_widths_are_refused(widths: tuple) -> None:
    with pytest.raises(ConfigError, match="widths are"):
        Grid(widths, 32, 1)
    with pytest.raises(ConfigError, match="a block is 0 x 1"):
        Grid(((4, 4),), 0, 1)


@pytest.mark.parametrize(
    ("config", "k", "v"),
    [
        (CSKVConfig(), None, None),
        (CSKVConfig(k_bits=4), Grid(((4, 12),), 32, 1), None),
        (CSKVConfig(v_bits=3, group=8), None, Grid(((3, 20),), 1, 32)),
        (CSKVConfig(k_bits=8, v_bits=4, group=1), Grid(((8, 12),), 1, 32), Grid(((4, 20),), 1, 32)),
        (
            CSKVConfig(k_bits=5, v_bits=2, group=8, k_block=(4, 2), v_block=(8, 1)),
            Grid(((5, 12),), 4, 2),
            Grid(((2, 20),), 8, 1),
        ),
    ],
)
def test_grids_that_settings_ask_for(config: CSKVConfig, k: Grid | None, v: Grid | None) -> None:
    """KIVI's blocks unless others are given; 16 bits are none."""
    assert (Grid.from_config(config, "k", 12, None), Grid.from_config(config, "v", 20, None)) == (k, v)


def test_mixed_widths_are_the_layers_own() -> None:
    runs, config = ((8, 2), (3, 10)), CSKVConfig(group=8, mixed_widths=True)
    assert Grid.from_config(config, "k", 12, runs) == Grid(runs, 8, 4)
    assert Grid.from_config(config, "k", 12, None) is None
    assert Grid.from_config(CSKVConfig(group=8, k_bits=4), "k", 12, runs) == Grid(((4, 12),), 8, 1)  # not asked for
    with pytest.raises(ConfigError, match="widths are"):
        Grid.from_config(config, "k", 12, ((9, 12),))

"""Changes of basis: nothing that is rebuilt changes, and latents become what few bits suit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv import Factors
from cskv.factorization.basis import centred, hadamard, hadamard_blocks, ordered, rotated, scaled

HIDDEN, KV_DIM, TOKENS = 10, 12, 50
seeds, yes_or_no = st.integers(0, 2**31), st.booleans()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, rank: int, biased: bool, down_biased: bool, groups: int = 1) -> tuple[Factors, Tensor]:
    """Random factors, and layer inputs with a mean."""
    factors = Factors(
        down=random(rank, HIDDEN, seed=seed),
        up=random(KV_DIM, rank // groups, seed=seed + 1),
        bias=random(KV_DIM, seed=seed + 2) if biased else None,
        down_bias=random(rank, seed=seed + 3) if down_biased else None,
    )
    return factors, random(TOKENS, HIDDEN, seed=seed + 4) + random(HIDDEN, seed=seed + 5)


def assert_rebuilds_alike(changed: Factors, factors: Factors, x: Tensor) -> None:
    assert (changed.rank, changed.groups) == (factors.rank, factors.groups)
    torch.testing.assert_close(changed.expand(changed.latents(x)), factors.expand(factors.latents(x)))


@given(seeds, st.sampled_from([1, 2, 3]), st.integers(1, 3), yes_or_no, yes_or_no)
def test_centring_moves_the_mean_into_the_bias(
    seed: int, groups: int, per_group: int, biased: bool, down_biased: bool
) -> None:
    factors, x = problem(seed, groups * per_group, biased, down_biased, groups)
    changed = centred(factors, factors.latents(x).mean(0))
    assert_rebuilds_alike(changed, factors, x)
    torch.testing.assert_close(changed.latents(x).mean(0), torch.zeros(factors.rank, dtype=torch.float64))
    assert factors.latents(x).mean(0).abs().min() > 1e-12  # they were not centred before


@given(seeds, st.sampled_from([1, 2, 3]), st.integers(1, 3), yes_or_no, yes_or_no)
def test_scaling_is_undone(seed: int, groups: int, per_group: int, biased: bool, down_biased: bool) -> None:
    factors, x = problem(seed, groups * per_group, biased, down_biased, groups)
    scale = random(factors.rank, seed=seed + 6).exp()
    changed = scaled(factors, scale)
    assert_rebuilds_alike(changed, factors, x)
    torch.testing.assert_close(changed.latents(x), factors.latents(x) * scale)


@given(seeds, st.sampled_from([1, 2, 3]), st.integers(1, 4), yes_or_no, yes_or_no)
def test_rotating_is_undone(seed: int, groups: int, per_group: int, biased: bool, down_biased: bool) -> None:
    factors, x = problem(seed, groups * per_group, biased, down_biased, groups)
    rotation, _ = torch.linalg.qr(random(per_group, per_group, seed=seed + 6))
    changed = rotated(factors, rotation)
    assert_rebuilds_alike(changed, factors, x)
    torch.testing.assert_close(changed.latents(x), factors.latents(x) @ torch.block_diag(*[rotation] * groups).T)


@given(seeds, st.integers(1, 8), yes_or_no, yes_or_no)
def test_any_order_of_all_latents_rebuilds_the_same(seed: int, rank: int, biased: bool, down_biased: bool) -> None:
    factors, x = problem(seed, rank, biased, down_biased)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    changed = ordered(factors, order)
    assert_rebuilds_alike(changed, factors, x)
    torch.testing.assert_close(changed.latents(x), factors.latents(x)[:, order])


@given(seeds, st.integers(2, 8), yes_or_no, yes_or_no, st.data())
def test_dropped_latents_count_as_zero(
    seed: int, rank: int, biased: bool, down_biased: bool, data: st.DataObject
) -> None:
    factors, x = problem(seed, rank, biased, down_biased)
    kept = torch.tensor(data.draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank - 1, unique=True)))
    zeroed = torch.zeros(TOKENS, rank, dtype=torch.float64)
    zeroed[:, kept] = factors.latents(x)[:, kept]
    changed = ordered(factors, kept)
    assert changed.rank == len(kept)
    torch.testing.assert_close(changed.expand(changed.latents(x)), factors.expand(zeroed))


@given(seeds)
def test_changes_can_follow_each_other(seed: int) -> None:
    factors, x = problem(seed, 8, biased=True, down_biased=False)
    changed = centred(factors, factors.latents(x).mean(0))
    changed = rotated(scaled(changed, 1 / changed.latents(x).std(0)), hadamard(8))
    assert_rebuilds_alike(changed, factors, x)
    torch.testing.assert_close(changed.latents(x).mean(0), torch.zeros(8, dtype=torch.float64))
    again = centred(changed, changed.latents(x + 1).mean(0))  # text of another mean
    assert_rebuilds_alike(again, factors, x)
    torch.testing.assert_close(again.latents(x + 1).mean(0), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 4, 32, 128])
def test_hadamard_spreads_every_channel_evenly(size: int) -> None:
    matrix = hadamard(size)
    assert matrix.shape == (size, size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize(("size", "blocks"), [(1, [1]), (3, [2, 1]), (8, [8]), (13, [8, 4, 1]), (164, [128, 32, 4])])
def test_any_size_is_covered_by_blocks(size: int, blocks: list[int]) -> None:
    matrix = hadamard_blocks(size)
    assert torch.equal(matrix, torch.block_diag(*map(hadamard, blocks)))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))

"""Commuting key factors: rotating latents is rotating keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskv import ConfigError, DataError
from cskv.factorization.commuting import RopePairs, commuting_components

HEADS, HEAD_DIM = 4, 10


def half_split(rotary: int = 8) -> RopePairs:
    """Llama's pairing, on the first `rotary` channels."""
    real = torch.arange(rotary // 2)
    return RopePairs(real, real + rotary // 2, torch.arange(rotary, HEAD_DIM))


def interleaved() -> RopePairs:
    """GLM's and Cohere's pairing."""
    even = torch.arange(0, HEAD_DIM, 2)
    return RopePairs(even, even + 1, torch.arange(0))


def rotate(keys: Tensor, pairs: RopePairs, position: int) -> Tensor:
    """RoPE by complex multiplication; keys are (tokens, heads * head_dim)."""
    heads = keys.unflatten(-1, (HEADS, HEAD_DIM)).clone()
    angles = position * 10000.0 ** -(torch.arange(len(pairs.real)).double() / len(pairs.real))
    turned = torch.complex(heads[..., pairs.real], heads[..., pairs.imaginary]) * torch.exp(1j * angles)
    heads[..., pairs.real], heads[..., pairs.imaginary] = turned.real, turned.imag
    return heads.flatten(-2)


def keys_of(seed: int, tokens: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = HEADS * HEAD_DIM
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mixing


pairings = st.sampled_from([half_split(), half_split(10), half_split(4), interleaved()])


@given(st.integers(0, 1000), pairings, st.integers(2, HEADS * HEAD_DIM), st.integers(1, 5000))
@settings(max_examples=30, deadline=None)
def test_rebuilding_commutes_with_rope(seed: int, pairs: RopePairs, rank: int, position: int) -> None:
    keys = keys_of(seed)
    factors = commuting_components(keys.T @ keys / len(keys), pairs).truncated(rank).to(dtype=torch.float64)

    def rebuild(k: Tensor) -> Tensor:
        return factors.expand(factors.latents(k))

    scale = keys.abs().max()
    assert (rebuild(rotate(keys, pairs, position)) - rotate(rebuild(keys), pairs, position)).abs().max() < 1e-5 * scale


@given(st.integers(0, 1000), pairings)
@settings(max_examples=20, deadline=None)
def test_full_rank_loses_nothing(seed: int, pairs: RopePairs) -> None:
    keys = keys_of(seed)
    factors = commuting_components(keys.T @ keys / len(keys), pairs).truncated(HEADS * HEAD_DIM).to(dtype=torch.float64)
    assert torch.allclose(factors.expand(factors.latents(keys)), keys, atol=1e-5 * float(keys.abs().max()))


def test_the_moment_may_be_taken_before_or_after_the_rotation() -> None:
    keys, pairs = keys_of(1), half_split(10)
    before = commuting_components(keys.T @ keys, pairs).truncated(12)
    turned = torch.cat([rotate(row[None], pairs, position) for position, row in enumerate(keys)])
    after = commuting_components(turned.T @ turned, pairs).truncated(12)
    projection = [factors.up.double() @ factors.down.double() for factors in (before, after)]
    assert torch.allclose(*projection, atol=1e-5)


def test_equal_heads_need_one_component_for_each_frequency() -> None:
    """Every head has the same keys: a quarter of the channels holds everything."""
    one = torch.randn(200, HEAD_DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = one.repeat(1, HEADS)
    factors = commuting_components(keys.T @ keys, interleaved()).truncated(HEAD_DIM).to(dtype=torch.float64)
    assert torch.allclose(factors.expand(factors.latents(keys)), keys, atol=1e-5)


def test_the_loss_is_the_sum_of_the_eigenvalues_left_out_and_no_less_than_pcas() -> None:
    keys, pairs, rank = keys_of(4), half_split(10), 12
    moment = keys.T @ keys / len(keys)
    factors = commuting_components(moment, pairs).truncated(rank).to(dtype=torch.float64)
    loss = float(((factors.expand(factors.latents(keys)) - keys) ** 2).sum(1).mean())
    kept = torch.trace(factors.down @ moment @ factors.up)
    assert loss == pytest.approx(float(moment.trace() - kept), rel=1e-4)
    assert loss >= float(torch.linalg.eigvalsh(moment)[:-rank].sum())


def test_a_gain_keeps_what_counts() -> None:
    pairs = RopePairs(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.arange(0))
    moment = torch.diag(torch.tensor([4.0, 1, 4, 1, 4, 1, 4, 1]))
    plain = commuting_components(moment, pairs).truncated(2)
    weighted = commuting_components(moment, pairs, gain=torch.tensor([1.0, 3, 1, 3, 1, 3, 1, 3])).truncated(2)
    assert set(plain.up.abs().sum(1).nonzero().flatten().tolist()) <= {0, 2, 4, 6}
    assert set(weighted.up.abs().sum(1).nonzero().flatten().tolist()) <= {1, 3, 5, 7}


def test_an_odd_rank_uses_its_last_latent_on_an_unrotated_channel_or_leaves_it() -> None:
    keys = keys_of(2)
    assert commuting_components(keys.T @ keys, half_split(8)).truncated(7).rank == 7
    assert commuting_components(keys.T @ keys, interleaved()).truncated(7).rank == 6


def test_a_single_kv_head_has_nothing_to_shrink() -> None:
    with pytest.raises(ConfigError, match="nothing to shrink"):
        commuting_components(torch.eye(HEAD_DIM), interleaved()).truncated(4)


def test_bad_input_is_named() -> None:
    moment = torch.eye(HEADS * HEAD_DIM)
    with pytest.raises(ConfigError, match="rank is 41"):
        commuting_components(moment, interleaved()).truncated(41)
    with pytest.raises(ConfigError, match="give at least 2"):
        commuting_components(moment, interleaved()).truncated(1)
    with pytest.raises(DataError, match="NaN"):
        commuting_components(moment * float("nan"), interleaved()).truncated(4)

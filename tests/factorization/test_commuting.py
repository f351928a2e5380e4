"""Commuting key factors: rotating latents is rotating keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskv import ConfigError, DataError, Factors
from cskv.factorization.commuting import RopePairs, commuting_components, commuting_part
from cskv.factorization.pca import principal_components
from cskv.quantization.fake import read_back
from cskv.quantization.grid import Grid

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
    gain = torch.diag(torch.tensor([1.0, 3, 1, 3, 1, 3, 1, 3]))
    weighted = commuting_components(moment, pairs, gain=gain).truncated(2)
    assert set(plain.up.abs().sum(1).nonzero().flatten().tolist()) <= {0, 2, 4, 6}
    assert set(weighted.up.abs().sum(1).nonzero().flatten().tolist()) <= {1, 3, 5, 7}


@given(st.integers(0, 1000), pairings, st.integers(1, 5000))
@settings(max_examples=30, deadline=None)
def test_the_commuting_part_commutes_and_is_the_nearest_that_does(seed: int, pairs: RopePairs, position: int) -> None:
    keys = keys_of(seed)
    moment = keys.T @ keys / len(keys)
    part, turn = commuting_part(moment, pairs), rotate(torch.eye(HEADS * HEAD_DIM).double(), pairs, position).T
    scale = float(moment.abs().max())
    assert torch.allclose(part, part.T, atol=1e-12 * scale)
    assert torch.allclose(turn @ part, part @ turn, atol=1e-10 * scale)
    assert (torch.linalg.eigvalsh(part) > -1e-10 * scale).all()
    assert torch.allclose(commuting_part(part, pairs), part, atol=1e-12 * scale)  # what commutes stays
    # What is left out is orthogonal to all that commutes, of which another part is an example.
    other = commuting_part(keys_of(seed + 1).T @ keys_of(seed + 1), pairs)
    assert abs(float(((moment - part) * other).sum())) < 1e-9 * float(moment.norm() * other.norm())


def test_the_commuting_part_is_the_mean_over_rotations() -> None:
    pair = RopePairs(torch.tensor([0]), torch.tensor([1]), torch.arange(0))
    moment = torch.tensor([[5.0, 1.0, 2.0, 0.5], [1.0, 3.0, -1.0, 4.0], [2.0, -1.0, 6.0, 0.0], [0.5, 4.0, 0.0, 2.0]])
    mean = torch.zeros(4, 4)
    for angle in torch.arange(0, 360).deg2rad():
        turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
        turn = torch.block_diag(turn, turn)
        mean += turn @ moment @ turn.T / 360
    found = commuting_part(moment, pair)
    assert torch.allclose(found, mean, atol=1e-5)
    assert found[:2, :2].tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert found[:2, 2:].tolist() == [[3.0, 0.75], [-0.75, 3.0]]


@given(st.integers(0, 1000), pairings, st.integers(2, HEADS * HEAD_DIM), st.integers(1, 5000))
@settings(max_examples=30, deadline=None)
def test_rebuilding_with_a_gain_commutes_with_rope(seed: int, pairs: RopePairs, rank: int, position: int) -> None:
    keys, others = keys_of(seed), keys_of(seed + 1)
    gain = commuting_part(others.T @ others / len(others), pairs)
    components = commuting_components(keys.T @ keys / len(keys), pairs, gain)
    factors = components.truncated(rank).to(dtype=torch.float64)

    def rebuild(k: Tensor) -> Tensor:
        return factors.expand(factors.latents(k))

    scale = keys.abs().max()
    assert (rebuild(rotate(keys, pairs, position)) - rotate(rebuild(keys), pairs, position)).abs().max() < 1e-4 * scale
    weighted = (keys - rebuild(keys)) @ gain
    lost, total = components.spectrum[factors.rank :].sum(), float(components.spectrum.sum())
    if rank % 2 == 0 and not len(pairs.unrotated):  # the leading ones, no pair of which is skipped
        assert float(weighted.square().sum(1).mean()) == pytest.approx(float(lost), rel=1e-2, abs=1e-4 * total)


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


def biased_problem(bias: float) -> tuple[Tensor, Tensor, Tensor, Tensor, RopePairs]:
    """Layer inputs, a projection with the bias of Qwen2's keys (hundreds in a few channels), queries, and pairs."""
    generator = torch.Generator().manual_seed(7)
    x, weight = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((64, 24), (40, 24)))
    offset = torch.zeros(40, dtype=torch.float64)
    offset[[1, 5, 17, 30]] = torch.tensor([bias, -bias, bias, -bias], dtype=torch.float64)
    queries = torch.randn(8, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    return x, weight, offset, queries, half_split(8)


def turned(keys: Tensor, pairs: RopePairs) -> Tensor:
    return torch.cat([rotate(row[None], pairs, position) for position, row in enumerate(keys)])


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("qhd,thd->hqt", queries, keys.unflatten(-1, (HEADS, HEAD_DIM)))


def commuting_scores(
    factors: Factors, queries: Tensor, keys: Tensor, pairs: RopePairs, grid: Grid | None
) -> tuple[Tensor, Tensor]:
    """Latents of rotated keys without their constant, and scores: the absorbed query's with them, and q . R_t mu."""
    constant = turned(factors.bias.expand(len(keys), -1), pairs)
    latents = (keys - constant) @ factors.down.T
    absorbed = torch.einsum("qhd,hdr->hqr", queries, factors.up.unflatten(0, (HEADS, HEAD_DIM)))
    return latents, absorbed @ read_back(latents[None], grid)[0].T + scores(queries, constant)


def test_what_is_constant_is_left_out_of_latents_and_read_back_in_scores() -> None:
    x, weight, offset, queries, pairs = biased_problem(600.0)
    plain = x @ weight.T + offset
    keys, mean = turned(plain, pairs), plain.mean(0)
    components = commuting_components(plain.T @ plain / len(plain), pairs, mean=mean)
    factors = components.truncated(40).to(dtype=torch.float64)
    latents, found = commuting_scores(factors, queries, keys, pairs, None)
    expected = scores(queries, keys)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert latents.abs().max() < 10 * (plain - mean).std() * 40**0.5 < plain.abs().max()
    assert float(components.spectrum.sum()) == pytest.approx(float((plain - mean).square().sum(1).mean()))
    assert torch.equal(components.truncated(4).bias, mean.float())
    assert commuting_components(plain.T @ plain, pairs).truncated(4).bias is None


@pytest.mark.parametrize("bias", [0.0, 600.0])
def test_in_few_bits_a_bias_hurts_no_more_than_it_hurts_joint_latents(bias: float) -> None:
    x, weight, offset, queries, pairs = biased_problem(bias)
    plain = x @ weight.T + offset
    keys, mean, moment = turned(plain, pairs), plain.mean(0), plain.T @ plain / len(plain)
    grid = Grid.uniform(40, 4, (32, 1))
    joint = principal_components(weight, mean, moment, bias=offset).factors.to(dtype=torch.float64)
    rebuilt = joint.expand(read_back(joint.latents(x)[None], grid)[0])
    expected = scores(queries, keys)
    of_joint = (scores(queries, turned(rebuilt, pairs)) - expected).square().mean().sqrt()
    factors = commuting_components(moment, pairs, mean=mean).truncated(40).to(dtype=torch.float64)
    of_commuting = (commuting_scores(factors, queries, keys, pairs, grid)[1] - expected).square().mean().sqrt()
    assert of_commuting < 1.5 * of_joint
    if bias:
        kept = commuting_components(moment, pairs).truncated(40).to(dtype=torch.float64)
        rebuilt = kept.expand(read_back(kept.latents(keys)[None], grid)[0])
        assert (scores(queries, rebuilt) - expected).square().mean().sqrt() > 10 * of_joint

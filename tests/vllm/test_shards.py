"""What tensor-parallel ranks keep rebuilds exactly their heads, and nothing of it is missing or there for nothing."""

from __future__ import annotations

import pytest
import torch

from cskv.errors import ConfigError
from cskv.factorization.factors import Factors
from cskv.vllm.shards import Shard

HEAD_DIM, HIDDEN = 4, 24


def factors(kv_heads: int, rank: int, groups: int, bias: bool = True) -> Factors:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    kv_dim = kv_heads * HEAD_DIM
    biases = (draw(kv_dim), draw(rank)) if bias else (None, None)
    return Factors(draw(rank, HIDDEN), draw(kv_dim, rank // groups), *biases)


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "heads"),
    [
        (1, 8, [(0, 8)]),
        (2, 8, [(0, 4), (4, 4)]),
        (4, 4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (4, 2, [(0, 1), (0, 1), (1, 1), (1, 1)]),  # as vLLM repeats heads: neighbours have the same
        (4, 1, [(0, 1)] * 4),
    ],
)
def test_heads_are_dealt_out_as_by_vllm(ranks: int, kv_heads: int, heads: list[tuple[int, int]]) -> None:
    shards = [Shard.of_rank(rank, ranks, kv_heads) for rank in range(ranks)]
    assert [(shard.first, shard.heads) for shard in shards] == heads
    assert {shard.total_heads for shard in shards} == {kv_heads}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("ranks", "kv_heads", "groups"),
    [(1, 4, 1), (1, 4, 4), (2, 4, 1), (2, 4, 2), (2, 8, 4), (4, 8, 2), (4, 2, 2), (4, 2, 1), (8, 8, 8), (3, 6, 3)],
)
def test_ranks_rebuild_exactly_their_heads(ranks: int, kv_heads: int, groups: int, bias: bool) -> None:
    whole = factors(kv_heads, 24, groups, bias)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = whole.expand(whole.latents(x)).unflatten(-1, (kv_heads, HEAD_DIM))
    for rank in range(ranks):
        shard = Shard.of_rank(rank, ranks, kv_heads)
        here = shard.factors(whole, groups)
        latents = here.latents(x)
        assert latents.shape[1] == here.rank == shard.rank_of(24, groups)
        got = here.expand(latents).unflatten(-1, (shard.heads, HEAD_DIM))
        assert torch.allclose(got, expected[:, shard.first : shard.first + shard.heads], rtol=1e-5, atol=1e-5)
        assert (here.bias is None) == (here.down_bias is None) == (not bias)


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "groups", "here"),
    [
        (2, 8, 1, 24),  # factors that all heads share: every rank needs every latent
        (2, 8, 2, 12),
        (2, 8, 4, 12),
        (4, 8, 2, 12),  # two ranks share a group
        (8, 8, 8, 3),
        (4, 2, 2, 12),  # heads are repeated, and their latents with them
    ],
)
def test_latents_of_a_rank(ranks: int, kv_heads: int, groups: int, here: int) -> None:
    for rank in range(ranks):
        assert Shard.of_rank(rank, ranks, kv_heads).rank_of(24, groups) == here


def test_groups_that_a_rank_needs() -> None:
    assert [list(Shard.of_rank(rank, 2, 8).groups(4)) for rank in (0, 1)] == [[0, 1], [2, 3]]
    assert [list(Shard.of_rank(rank, 4, 8).groups(2)) for rank in range(4)] == [[0], [0], [1], [1]]


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "groups"),
    [
        (1, 8, 3),  # heads do not split evenly
        (1, 4, 8),  # more groups than heads
        (3, 6, 2),  # ranks of 2 heads, groups of 3
        (2, 12, 3),  # ranks of 6 heads, groups of 4
    ],
)
def test_groups_that_cut_across_ranks_are_refused(ranks: int, kv_heads: int, groups: int) -> None:
    shard = Shard.of_rank(0, ranks, kv_heads)
    with pytest.raises(ConfigError) as caught:
        shard.groups(groups)
    assert str(caught.value) == (
        f"{groups} head groups of {kv_heads} kv heads cut across ranks of {kv_heads // ranks}: give a number of groups "
        "and of ranks that divide each other"
    )

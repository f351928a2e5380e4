"""The reference on problems that can be done by hand."""

from __future__ import annotations

import math

import torch

from cskv.attention.inputs import AttentionInputs, Logits, Rotation, split_heads
from cskv.attention.reference import attention
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.view import PlainLatents, View
from tests.attention.problems import Problem

ONE = Factors(torch.zeros(1, 1), torch.tensor([[2.0], [0.0]]))  # channels (2c, 0)


def two_tokens(query: list[float]) -> tuple[torch.Tensor, View, LayerFactors]:
    """One head of two channels: a sealed token with latents 1 and 3, and an exact one with key (0, 1), value (0, 8)."""
    view = View(
        torch.tensor([[[[0.0, 1.0]]]]),
        torch.tensor([[[[0.0, 8.0]]]]),
        PlainLatents(torch.tensor([[[1.0]]])),
        PlainLatents(torch.tensor([[[3.0]]])),
    )
    return torch.tensor([[[query]]]), view, LayerFactors(ONE, ONE)


def test_equal_logits_average_both_branches() -> None:
    """Keys (2, 0) and (0, 1): the query (1, 2) gives both 2. Values (6, 0) and (0, 8)."""
    query, view, factors = two_tokens([1.0, 2.0])
    assert attention(query, AttentionInputs(view, factors, None, Logits(1.0))).flatten().tolist() == [3.0, 4.0]


def test_the_softmax_of_0_and_1_is_1_over_1_plus_e() -> None:
    query, view, factors = two_tokens([0.0, 1.0])
    first = 1 / (1 + math.e)
    expected = torch.tensor([6 * first, 8 * (1 - first)])
    assert torch.allclose(attention(query, AttentionInputs(view, factors, None, Logits(1.0))).flatten(), expected)


def test_rope_turns_rebuilt_keys_only() -> None:
    """A quarter turn takes the sealed key (2, 0) to (0, 2); the exact one is (0, 1). The query (0, 1) gives 2 and 1."""
    query, view, factors = two_tokens([0.0, 1.0])

    def heads(channels, cos, sin):
        x = split_heads(channels, 2)
        return x * cos + torch.cat([-x[..., 1:], x[..., :1]], dim=-1) * sin

    rope = Rotation(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), heads)
    first = math.e / (1 + math.e)
    expected = torch.tensor([6 * first, 8 * (1 - first)])
    assert torch.allclose(attention(query, AttentionInputs(view, factors, rope, Logits(1.0))).flatten(), expected)


def test_softcap_mask_and_sinks() -> None:
    query, view, factors = two_tokens([4.0, 0.0])  # products 8 and 0

    def told(query: torch.Tensor, logits: Logits) -> torch.Tensor:
        return attention(query, AttentionInputs(view, factors, None, logits)).flatten()

    capped = told(query, Logits(1.0, softcap=2.0))
    weight = math.exp(2 * math.tanh(4.0)) / (1 + math.exp(2 * math.tanh(4.0)))
    assert torch.allclose(capped, torch.tensor([6 * weight, 8 * (1 - weight)]))
    masked = told(query, Logits(1.0, mask=torch.tensor([[[[False, True]]]])))
    assert masked.tolist() == [0.0, 8.0]
    added = told(query, Logits(1.0, mask=torch.tensor([[[[-8.0, 0.0]]]])))
    assert torch.allclose(added, torch.tensor([3.0, 4.0]))
    sunk = told(query * 0, Logits(1.0, sinks=torch.tensor([0.0])))
    assert torch.allclose(sunk, torch.tensor([2.0, 8 / 3]))  # a third of the weight is given to nothing


def test_later_queries_of_a_forward_read_the_earlier_tokens_and_not_the_other_way() -> None:
    problem = Problem(new=3, recent=5)
    view, query = problem.view(), problem.query()
    together = attention(query, problem.inputs())
    for i in range(3):
        kept = 5 - 3 + i + 1
        shorter = View(view.keys[:, :, :kept], view.values[:, :, :kept], view.k, view.v)
        alone = attention(query[:, :, i : i + 1], problem.inputs(view=shorter))
        assert torch.allclose(together[:, :, i : i + 1], alone, atol=1e-6)


def test_heads_of_a_group_read_the_same_keys() -> None:
    problem = Problem(q_heads=6, kv_heads=2)
    query = problem.query()
    query[:, 1] = query[:, 0]
    query[:, 3] = query[:, 0]
    out = attention(query, problem.inputs())
    assert torch.equal(out[:, 0], out[:, 1])  # heads 0, 1, 2 read kv head 0
    assert not torch.allclose(out[:, 0], out[:, 3])

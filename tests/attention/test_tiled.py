"""The torch backend against the reference: every rule, every layout, at odd lengths and at every cut into tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from cskv.attention import reference, tiled
from cskv.attention.inputs import Rotation, split_heads
from cskv.attention.rebuild import rebuilt
from cskv.latents.view import PackedLatents, View
from cskv.scratch import Scratch
from tests.attention.problems import Problem

# The largest difference allowed, of outputs of size 1. bfloat16 rounds logits and weights, as eager attention does.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 6e-2}
LAYOUTS = [None, (4, (8, 1)), (2, (1, 4)), (3, (4, 4)), (8, (8, 5))]

problems = st.builds(
    Problem,
    batch=st.integers(1, 3),
    q_heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    k_rank=st.sampled_from([4, 12]),
    v_rank=st.sampled_from([4, 8]),
    sealed=st.sampled_from([0, 1, 8, 63, 200]),
    recent=st.integers(3, 9),
    new=st.integers(1, 3),
    bias=st.booleans(),
    rotary=st.sampled_from([None, 8, 16]),
    k_grid=st.sampled_from(LAYOUTS),
    v_grid=st.sampled_from(LAYOUTS),
)
rules = st.fixed_dictionaries(
    {
        "mask": st.sampled_from([None, "bool", "additive"]),
        "softcap": st.sampled_from([None, 2.0]),
        "sinks": st.booleans(),
    }
)


def outputs(problem: Problem, told: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> tuple:
    """Of the reference in fp64 and of the torch backend in `dtype`."""
    query, inputs = problem.query().to(dtype), problem.inputs(problem.logits(**told), dtype)
    expected = reference.attention(query.double(), replace(inputs, rotation=problem.rope(torch.float64)))
    got = tiled.attention(query, inputs, **options)
    assert got.dtype == dtype
    return expected, got.double()


@given(problems, rules, st.sampled_from([1, 2]))
@settings(max_examples=120, deadline=None)
def test_it_is_the_reference(problem: Problem, told: dict[str, Any], groups: int) -> None:
    if problem.kv_heads % groups == 0:
        problem = replace(problem, groups=groups)
    expected, got = outputs(problem, told)
    assert (got - expected).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("sealed", [1, 63, 500, 1000])
@pytest.mark.parametrize("rotary", [None, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_odd_lengths_in_other_dtypes(sealed: int, rotary: int | None, dtype: torch.dtype) -> None:
    problem = Problem(sealed=sealed, rotary=rotary, k_rank=41, v_rank=205, head_dim=128, q_heads=8, recent=32)
    expected, got = outputs(problem, {}, dtype)
    assert (got - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotary", [None, 8])
def test_the_cut_into_tiles_does_not_show(layout, rotary: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(batch=2, sealed=333, rotary=rotary, k_grid=layout, v_grid=layout, new=2, bias=True)
    _, whole = outputs(problem, {"mask": "bool"})
    monkeypatch.setattr(tiled, "LEAST_TILE", 8)
    for numbers in (1, 3000):
        monkeypatch.setattr(tiled, "SCORES", numbers)
        expected, got = outputs(problem, {"mask": "bool"})
        assert (got - expected).abs().max() < TOLERANCE[torch.float32]
        assert (got - whole).abs().max() < TOLERANCE[torch.float32]


def test_a_workspace_full_of_nan_changes_nothing() -> None:
    problem = Problem(sealed=100, k_grid=(4, (8, 1)), v_grid=(3, (1, 4)))
    scratch = Scratch()
    _, first = outputs(problem, {}, scratch=scratch)
    for storage in scratch._storages.values():
        storage.fill_(float("nan") if storage.is_floating_point() else 255)
    _, second = outputs(problem, {}, scratch=scratch)
    assert torch.equal(first, second)


def test_blocks_that_a_crop_cut_short() -> None:
    problem = Problem(sealed=20, k_grid=(4, (8, 1)), v_grid=(4, (8, 1)))
    view = problem.view()
    rows = torch.tensor([0] * 5 + [1] * 8 + [2] * 7)
    cut = View(view.keys, view.values, *(replace(part, token_block=rows) for part in (view.k, view.v)))
    assert isinstance(cut.k, PackedLatents)
    expected = reference.attention(problem.query(), problem.inputs(view=cut))
    got = tiled.attention(problem.query(), problem.inputs(view=cut))
    assert torch.allclose(got, expected, atol=3e-5)
    other = reference.attention(problem.query(), problem.inputs(view=view))
    assert not torch.allclose(expected, other, atol=1e-3)  # the rows matter


@pytest.mark.parametrize("groups", [1, 2])
def test_norms_of_keys_and_values_are_applied_to_what_is_rebuilt(groups: int) -> None:
    """Families that normalise rebuilt keys (Qwen3) and values (Gemma4): nothing can be absorbed there."""
    problem = Problem(sealed=70, groups=groups)

    def unit(channels, *_):
        heads = split_heads(channels, 16)
        return heads / heads.square().mean(-1, keepdim=True).sqrt()

    inputs = replace(problem.inputs(), rotation=Rotation(None, None, unit), value_heads=unit)
    expected = reference.attention(problem.query(), inputs)
    assert torch.allclose(tiled.attention(problem.query(), inputs), expected, atol=3e-5)


LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("attention", [tiled.attention, reference.attention])
@pytest.mark.parametrize("hiding", [False, -torch.inf, LEAST], ids=["bool", "infinite", "least"])
@pytest.mark.parametrize("rotary", [None, 16])
def test_what_masks_hide_is_hidden_as_by_the_models_own_attention(
    attention, hiding: float, rotary: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles, all that is sealed, all that is exact, and all: the padding of a left-padded batch reads nothing."""
    monkeypatch.setattr(tiled, "SCORES", 1)  # tiles of 64 tokens
    problem = Problem(batch=5, sealed=200, new=2, rotary=rotary)
    mask = torch.ones(5, 1, 2, 205, dtype=torch.bool) if hiding is False else torch.zeros(5, 1, 2, 205)
    for row, tokens in enumerate((slice(0, 150), slice(64, 128), slice(0, 200), slice(200, 205), slice(0, 205))):
        mask[row, ..., tokens] = hiding
    if hiding == LEAST:
        mask[:3, ..., :100] = -torch.inf  # both kinds in one mask
    inputs = problem.inputs(replace(problem.logits(), mask=mask))
    keys, values = (part.repeat_interleave(2, dim=1) for part in rebuilt(inputs))
    expected = scaled_dot_product_attention(problem.query(), keys, values, mask, scale=inputs.logits.scaling)
    assert torch.allclose(attention(problem.query(), inputs), expected, atol=3e-5)


def test_large_logits_do_not_overflow() -> None:
    problem = Problem(sealed=70, rotary=None)
    query, inputs = problem.query() * 3000, problem.inputs()
    assert torch.allclose(tiled.attention(query, inputs), reference.attention(query, inputs), atol=1e-3)

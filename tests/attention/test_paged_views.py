"""Requests of different lengths in pages, read together by the reference and by torch, against each by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cskv.attention import attend, reference
from cskv.latents.view import View
from tests.attention.problems import PagedProblem, one_by_one

LAYOUTS = [None, (4, (8, 1)), (8, (8, 1)), (4, (1, 32)), (8, (1, 32)), (3, (4, 4))]

problems = st.builds(
    PagedProblem,
    q_heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([2, 4]),
    k_rank=st.sampled_from([4, 12]),
    v_rank=st.sampled_from([4, 8]),
    recent=st.integers(3, 9),
    new=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    norm=st.booleans(),
    rotary=st.sampled_from([None, 8, 16]),
    k_grid=st.sampled_from(LAYOUTS),
    v_grid=st.sampled_from(LAYOUTS),
    lengths=st.lists(st.sampled_from([0, 1, 8, 15, 16, 17, 63, 150]), min_size=1, max_size=4).map(tuple),
    above=st.sampled_from([0, 40]),
    block_size=st.sampled_from([8, 16, 24]),
    hides=st.booleans(),
    names=st.sampled_from([torch.int32, torch.int64]),
)
rules = st.fixed_dictionaries(
    {
        "mask": st.sampled_from([None, "bool", "additive"]),
        "softcap": st.sampled_from([None, 2.0]),
        "sinks": st.booleans(),
    }
)


@given(problems, rules)
@settings(max_examples=120)
def test_together_is_one_by_one(problem: PagedProblem, told: dict[str, Any]) -> None:
    logits = problem.logits(**told)
    expected = one_by_one(reference.attention, problem, torch.float32, logits)
    query, inputs = problem.query(), problem.inputs(logits)
    together = reference.attention(query.double(), inputs)
    assert (together - expected).abs().max() < 1e-10
    got = attend.attention(query, inputs)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 3e-5


@pytest.mark.parametrize("rotary", [None, 8])
@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_the_cut_into_tiles_does_not_show(rotary: int | None, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PagedProblem(
        lengths=(333, 0, 24, 25),
        rotary=rotary,
        block_size=block_size,
        k_grid=(4, (8, 1)),
        v_grid=(4, (1, 32)),
        bias=True,
    )
    logits = problem.logits(mask="bool")
    expected = one_by_one(reference.attention, problem, torch.float32, logits)
    monkeypatch.setattr(attend, "LEAST_TILE", 8)
    for numbers in (1, 3000, 2**19):
        monkeypatch.setattr(attend, "SCORES", numbers)
        got = attend.attention(problem.query(), problem.inputs(logits))
        assert (got - expected).abs().max() < 3e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nobody_has_sealed_tokens(backend: str) -> None:
    problem = PagedProblem(lengths=(0, 0), hides=False)
    view = problem.paged()
    exact = View(view.keys, view.values)
    got, expected = (
        attend.attention(problem.query(), problem.inputs(view=part), backend=backend) for part in (view, exact)
    )
    assert torch.equal(got, expected)


def test_rows_that_are_no_requests_change_nothing() -> None:
    """A server pads its batch: such rows come out as numbers, and the others as before."""
    problem = PagedProblem(lengths=(40, 0, 17), hides=True)
    view = problem.paged()
    assert view.exists is not None
    none = replace(view, exists=view.exists.clone().index_fill_(0, torch.tensor([1]), False))
    got, expected = (attend.attention(problem.query(), problem.inputs(view=part)) for part in (none, view))
    assert torch.isfinite(got).all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])

"""float16 at long contexts, by every backend against the reference in fp64: nothing leaves its range of 65504."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cskv.attention.attend import attention
from cskv.attention.inputs import AttentionInputs
from cskv.attention.reference import attention as reference
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.view import PlainLatents, View
from tests.attention.problems import Problem
from tests.interpreter import mend_interpreter

HALF = torch.float16
LENGTHS = {"reference": 2**15, "torch": 2**15, "auto": 2**15, "triton": 2**11}  # an interpreted kernel is slow


def large(problem: Problem, query: float, scaling: float) -> tuple[Tensor, AttentionInputs]:
    """Keys, values and biases of about 100, of one sign: sums of values and of weights are out of range."""
    inputs = problem.inputs()
    view, up = inputs.view, inputs.factors
    assert view.k is not None
    assert view.v is not None
    k, v = (PlainLatents((100 + 10 * part.read()).to(HALF)) for part in (view.k, view.v))
    exact = [(100 + 10 * part).to(HALF) for part in (view.keys, view.values)]
    bias = torch.full((problem.kv_heads * problem.head_dim,), 100.0)
    factors = LayerFactors(*(Factors(part.down, part.up, bias) for part in (up.k, up.v))).to(dtype=HALF)
    inputs = AttentionInputs(View(*exact, k, v), factors, problem.rope(HALF), replace(inputs.logits, scaling=scaling))
    return (query * problem.query()).to(HALF), inputs


@pytest.mark.parametrize("backend", LENGTHS)
@pytest.mark.parametrize("rotary", [None, 16])
@pytest.mark.parametrize(("query", "scaling"), [(0.0, 1.0), (3000.0, 1e-6)], ids=["flat", "large queries"])
def test_sums_and_products_stay_in_range(backend: str, rotary: int | None, query: float, scaling: float) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        mend_interpreter()
    problem = Problem(q_heads=2, kv_heads=1, k_rank=16, v_rank=16, sealed=LENGTHS[backend], rotary=rotary)
    asked, inputs = large(problem, query, scaling)
    expected, got = reference(asked.double(), inputs), attention(asked, inputs, backend=backend)
    assert got.dtype == HALF
    assert (got - expected).abs().max() < 3e-3 * expected.abs().max()

"""Which backend does the work, and what is said when it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cskv
from cskv.attention import dispatch, reference, tiled
from cskv.attention.dispatch import attention
from cskv.attention.rebuild import rebuilt
from cskv.attention.triton import launch
from tests.attention.problems import Problem
from tests.interpreter import mend_interpreter

PROBLEM = Problem()


def attend(backend: str) -> torch.Tensor:
    return attention(PROBLEM.query(), PROBLEM.inputs(), backend=backend)


def test_auto_on_a_cpu_is_torch_and_silent() -> None:
    expected = tiled.attention(PROBLEM.query(), PROBLEM.inputs())
    assert torch.equal(attend("auto"), expected)
    assert torch.equal(attend("torch"), expected)


def test_the_reference_can_be_asked_for() -> None:
    assert torch.equal(attend("reference"), reference.attention(PROBLEM.query(), PROBLEM.inputs()))


def test_an_unknown_backend_is_one_line() -> None:
    with pytest.raises(cskv.ConfigError, match="attention is 'flash'; expected one of auto, triton, torch, reference"):
        attend("flash")


def test_what_a_backend_cannot_do_falls_to_the_next_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._say_once.cache_clear()
    monkeypatch.setattr(launch, "refusal", lambda *_: "it is Tuesday")
    with pytest.warns(UserWarning, match="by torch, not triton: it is Tuesday"):
        first = attend("triton")
    assert torch.equal(first, attend("triton"))  # and no second warning, which would be an error here
    assert torch.equal(first, attend("torch"))
    dispatch._say_once.cache_clear()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    expected, keys = attend(backend), rebuilt(PROBLEM.inputs())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(backend), expected)
        assert torch.equal(rebuilt(PROBLEM.inputs())[0], keys)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("rotary", [None, 16])
@pytest.mark.parametrize("of_latents", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_query", [torch.float32, torch.bfloat16])
def test_the_latents_dtype_is_computed_in(
    backend: str, rotary: int | None, of_latents: torch.dtype, of_query: torch.dtype
) -> None:
    """What autocast makes of a layer: query, keys, values and factors in dtypes of their own."""
    if backend == "triton":
        pytest.importorskip("triton")
        mend_interpreter()
    problem = replace(PROBLEM, rotary=rotary)
    query, inputs = problem.query().to(of_query), problem.inputs(dtype=of_latents)
    mixed = replace(inputs, view=replace(inputs.view, values=inputs.view.values.float()), factors=problem.factors())
    got = attention(query, mixed, backend=backend)
    assert got.dtype == of_query
    expected = attention(query.to(of_latents), inputs, backend=backend).to(of_query)
    if backend == "reference":
        assert torch.allclose(got, expected, atol=5e-2)
    else:
        assert torch.equal(got, expected)

"""Which backend does the work, and torch against the reference: every rule, layout, length and cut into tiles."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import cskv
from cskv.attention import attend, reference
from cskv.attention.attend import Partial, attention
from cskv.attention.cpu.library import library
from cskv.attention.inputs import Rotation, rebuilt, split_heads
from cskv.attention.triton import launch
from cskv.latents.view import PackedLatents, View
from cskv.scratch import Scratch
from tests.attention.problems import Problem
from tests.interpreter import mend_interpreter

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


by_torch, by_kernels = (partial(attention, backend=backend) for backend in ("torch", "auto"))


def outputs(problem: Problem, told: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> tuple:
    """Of the reference in fp64 and of the torch backend in `dtype`."""
    query, inputs = problem.query().to(dtype), problem.inputs(problem.logits(**told), dtype)
    expected = reference.attention(query.double(), replace(inputs, rotation=problem.rope(torch.float64)))
    got = by_torch(query, inputs, **options)
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
    monkeypatch.setattr(attend, "LEAST_TILE", 8)
    for numbers in (1, 3000):
        monkeypatch.setattr(attend, "SCORES", numbers)
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
    got = by_torch(problem.query(), problem.inputs(view=cut))
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
    assert torch.allclose(by_torch(problem.query(), inputs), expected, atol=3e-5)


LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("compute", [by_torch, by_kernels, reference.attention])
@pytest.mark.parametrize("hiding", [False, -torch.inf, LEAST], ids=["bool", "infinite", "least"])
@pytest.mark.parametrize("rotary", [None, 16])
def test_what_masks_hide_is_hidden_as_by_the_models_own_attention(
    compute, hiding: float, rotary: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles, all that is sealed, all that is exact, and all: the padding of a left-padded batch reads nothing."""
    monkeypatch.setattr(attend, "SCORES", 1)  # tiles of 64 tokens
    problem = Problem(batch=5, sealed=200, new=2, rotary=rotary)
    mask = torch.ones(5, 1, 2, 205, dtype=torch.bool) if hiding is False else torch.zeros(5, 1, 2, 205)
    for row, tokens in enumerate((slice(0, 150), slice(64, 128), slice(0, 200), slice(200, 205), slice(0, 205))):
        mask[row, ..., tokens] = hiding
    if hiding == LEAST:
        mask[:3, ..., :100] = -torch.inf  # both kinds in one mask
    inputs = problem.inputs(replace(problem.logits(), mask=mask))
    keys, values = (part.repeat_interleave(2, dim=1) for part in rebuilt(inputs))
    expected = scaled_dot_product_attention(problem.query(), keys, values, mask, scale=inputs.logits.scaling)
    assert torch.allclose(compute(problem.query(), inputs), expected, atol=3e-5)


def test_large_logits_do_not_overflow() -> None:
    problem = Problem(sealed=70, rotary=None)
    query, inputs = problem.query() * 3000, problem.inputs()
    assert torch.allclose(by_torch(query, inputs), reference.attention(query, inputs), atol=1e-3)


PROBLEM = Problem()


def by(backend: str) -> torch.Tensor:
    return attention(PROBLEM.query(), PROBLEM.inputs(), backend=backend)


def test_auto_on_a_cpu_is_the_compiled_kernels_and_silent() -> None:
    assert torch.equal(by("auto"), by("torch" if library() is None else "cpu"))


def test_the_reference_can_be_asked_for() -> None:
    assert torch.equal(by("reference"), reference.attention(PROBLEM.query(), PROBLEM.inputs()))


def test_an_unknown_backend_is_one_line() -> None:
    with pytest.raises(
        cskv.ConfigError, match="attention is 'flash'; expected one of auto, triton, cpu, torch, reference"
    ):
        by("flash")


def test_what_a_backend_cannot_do_falls_to_the_next_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launch._say_once.cache_clear()
    monkeypatch.setattr(launch, "refusal", lambda *_: "it is Tuesday")
    with pytest.warns(UserWarning, match="by torch, not triton: it is Tuesday"):
        first = by("triton")
    assert torch.equal(first, by("triton"))  # and no second warning, which would be an error here
    assert torch.equal(first, by("torch"))
    launch._say_once.cache_clear()


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    expected, keys = by(backend), rebuilt(PROBLEM.inputs())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(by(backend), expected)
        assert torch.equal(rebuilt(PROBLEM.inputs())[0], keys)


@pytest.mark.parametrize("backend", ["torch", "auto", "triton", "reference"])
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


def part(logits: list[float], values: list[float]) -> Partial:
    x, v = torch.tensor(logits)[None, None, None], torch.tensor(values)
    most = x.amax(-1, keepdim=True)
    weights = (x - most).exp()
    return Partial(most, weights.sum(-1, keepdim=True), (weights * v).sum(-1, keepdim=True))


numbers = st.lists(st.tuples(st.floats(-80, 80, width=32), st.floats(-4, 4, width=32)), min_size=2, max_size=9)


@given(numbers, st.data())
def test_joined_parts_are_the_whole(pairs: list[tuple[float, float]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(pairs) - 1))
    logits, values = [p[0] for p in pairs], [p[1] for p in pairs]
    left, right = part(logits[:cut], values[:cut]), part(logits[cut:], values[cut:])
    expected = float(torch.softmax(torch.tensor(logits, dtype=torch.float64), 0) @ torch.tensor(values).double())
    assert abs(left.joined(right).result().item() - expected) < 1e-4
    assert abs(right.joined(left).result().item() - expected) < 1e-4


def test_sinks_take_weight_and_give_nothing() -> None:
    joined = part([0.0], [6.0]).joined(part([0.0], [3.0]))
    assert joined.result(torch.tensor([0.0])).item() == 3.0  # a third each
    assert joined.result(torch.tensor([1000.0])).item() == 0.0
    assert joined.result(torch.tensor([-1000.0])).item() == 4.5

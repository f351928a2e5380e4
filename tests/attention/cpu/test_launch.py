"""The CPU kernels against the reference in fp64, by every level of instructions that this processor has.

Memory that the launcher allocates is filled with NaN first, so that a number that nothing wrote shows.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskv.attention import reference
from cskv.attention.attend import attention
from cskv.attention.cpu import launch
from cskv.attention.cpu.library import LEVELS, Library, library
from cskv.attention.inputs import KeyOffset, Logits
from cskv.attention.int8_keys import Int8Keys
from cskv.factorization.factors import LayerFactors
from cskv.latents.pages import PagedLatents
from cskv.latents.view import PlainLatents, View
from cskv.scratch import Scratch
from tests.attention.cases import CASES, Case, Made, by_torch, grid, make, plain_rope
from tests.attention.paged_cases import ABSORBED, KIVI, ROTATED
from tests.attention.paged_cases import CASES as PAGED
from tests.attention.problems import PagedProblem, one_by_one

BEST = library()
pytestmark = pytest.mark.skipif(BEST is None, reason="the CPU kernels are not built")
# Of the largest output, which is about 1. In 16 bits, absorbed queries, rebuilt keys and weights are each rounded once.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Library:
    assert BEST is not None
    if request.param not in BEST.usable:
        pytest.skip(f"this processor or build has no {request.param}")
    return replace(BEST, level=LEVELS.index(request.param))


class NaNScratch(Scratch):
    """Memory that is full of NaN whenever it is taken."""

    def take(self, *args, **kwargs) -> Tensor:
        return super().take(*args, **kwargs).fill_(255)


def run(made: Made, level: Library) -> Tensor:
    assert made.by(launch.refusal) is None
    return launch.attention(made.query, made.inputs, NaNScratch(), level)


def check(case: Case, level: Library) -> None:
    made = make(replace(case, device="cpu"))
    out, truth = run(made, level), made.truth()
    assert out.dtype == case.dtype
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < TOLERANCES[case.dtype], error


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, level: Library) -> None:
    check(CASES[name], level)


@pytest.mark.parametrize("name", CASES)
def test_agrees_in_bfloat16(name: str, level: Library) -> None:
    """The cases of fp32 too: 16-bit numbers take other ways through the kernels."""
    case = replace(CASES[name], dtype=torch.bfloat16)
    made = make(replace(case, device="cpu"))
    out, truth = run(made, level), made.truth()
    error = (out.double() - truth).abs().max() / truth.abs().max()
    by_others = (by_torch(made).double() - truth).abs().max() / truth.abs().max()
    assert error < max(TOLERANCES[torch.bfloat16], 1.5 * by_others), (error, by_others)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("blocks", [((32, 1), (1, 32)), ((32, 4), (32, 4)), ((1, 205), (1, 3))])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_width_at_real_sizes(bits: int, blocks: tuple, dtype: torch.dtype) -> None:
    assert BEST is not None
    k, v = grid(205, bits, *blocks[0]), grid(205, bits, *blocks[1])
    for rotary in (None, 128):
        case = Case(333, 37, 1, (8, 2), 1, 128, (205, 205), rotary_dim=rotary, k=k, v=v, dtype=dtype)
        check(case, BEST)


@given(
    case=st.builds(
        Case,
        sealed=st.integers(1, 700),
        recent=st.integers(3, 40),
        batch=st.integers(1, 3),
        heads=st.sampled_from([(4, 2), (9, 3), (14, 2), (3, 3), (8, 1)]),
        new=st.integers(1, 3),
        head_dim=st.sampled_from([16, 40, 64, 80]),
        ranks=st.tuples(st.integers(1, 70), st.integers(1, 70)),
        rotary_dim=st.sampled_from([None, 8, 16]),
        bias=st.booleans(),
        norm=st.booleans(),
        sinks=st.booleans(),
        softcap=st.sampled_from([None, 2.0]),
        mask=st.sampled_from([None, "bool", "infinite"]),
    ),
    threads=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_by_any_number_of_threads(case: Case, threads: int) -> None:
    assert BEST is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, BEST)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", PAGED)
def test_requests_in_pages_are_one_by_one(name: str, dtype: torch.dtype, level: Library) -> None:
    """Every byte that is no request's is NaN."""
    problem, told = PAGED[name]
    problem = replace(problem, device="cpu")
    if dtype != torch.float32 and problem.q_heads > 4:
        pytest.skip("one size of each is enough")
    check_paged(problem, dtype, level, **told)


def check_paged(problem: PagedProblem, dtype: torch.dtype, level: Library, **told) -> None:
    logits = problem.logits(**told)
    query, inputs = problem.query().to(dtype), problem.inputs(logits, dtype)
    assert launch.refusal(query, inputs) is None
    out = launch.attention(query, inputs, NaNScratch(), level)
    truth = one_by_one(reference.attention, problem, dtype, logits)
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < TOLERANCES[dtype], error


def test_no_length_is_above_the_bound() -> None:
    """Tokens past `most` are not read: there is no room for their cos and sin."""
    assert BEST is not None
    problem = replace(ROTATED, lengths=(70, 33), hides=False, device="cpu")
    view = problem.paged()
    assert isinstance(view.k, PagedLatents)
    longer = view.k.lengths + 16
    short = replace(problem, lengths=(64, 49))
    outputs = []
    for lengths in (longer, longer.clamp(max=64)):
        parts = [replace(part, lengths=lengths, length=64) for part in (view.k, view.v)]  # type: ignore[type-var]
        inputs = short.inputs(view=View(view.keys, view.values, *parts))
        outputs.append(launch.attention(problem.query(), inputs, NaNScratch(), BEST))
    assert torch.equal(outputs[0][0], outputs[1][0])  # the other has no tokens there, and reads what is in memory
    assert torch.isfinite(outputs[0][0]).all()


def test_nan_in_the_query_is_nan_in_its_output_alone(level: Library) -> None:
    made = make(Case(sealed=100, batch=2, rotary_dim=16, device="cpu"))
    made.query[0, 1] = float("nan")
    out = run(made, level)
    assert out[0, 1].isnan().all()
    assert torch.isfinite(out[1]).all()
    assert torch.isfinite(out[0, 0]).all()


def test_halves_that_are_equal_are_read_once(level: Library) -> None:
    made = make(Case(sealed=100, rotary_dim=16, device="cpu"))
    rope = made.inputs.rotation
    assert rope is not None
    cos, sin = (part[..., :8].repeat(1, 1, 2) for part in (rope.cos, rope.sin))  # type: ignore[index]
    both = made.told(rotation=plain_rope(cos, sin, 16))
    one = made.told(rotation=replace(plain_rope(cos, sin, 16), is_symmetric=True))
    assert torch.equal(run(one, level), run(both, level))


@pytest.mark.parametrize("changed", ["rotation", "key_offset", "factors", "values", "view"])
def test_what_is_kept_of_sealed_tokens_is_not_used_with_others(changed: str, level: Library) -> None:
    """Addresses are kept by the latents of keys, from step to step."""
    case = Case(sealed=100, rotary_dim=None if changed == "key_offset" else 16, device="cpu")
    made, other = make(case), make(replace(case, batch=2))
    rope, view, factors = made.inputs.rotation, made.inputs.view, made.inputs.factors
    run(made, level)
    if changed == "rotation":
        assert rope is not None
        told = made.told(rotation=plain_rope(rope.sin, rope.cos, 16))  # type: ignore[arg-type]
    elif changed == "key_offset":
        angles = torch.randn(2, 1, 100, 16)
        told = made.told(key_offset=KeyOffset(plain_rope(angles[0], angles[1], 16), torch.randn(32)))
    elif changed == "factors":
        told = made.told(factors=replace(factors, v=replace(factors.v, up=factors.v.up.flip(0))))
    elif changed == "values":
        told = made.told(view=replace(view, v=PlainLatents(torch.randn(1, 100, 20))))
    else:
        told = replace(other, inputs=replace(other.inputs, factors=factors))
    out, truth = run(told, level), told.truth()
    assert (out - run(made, level)).abs().max() > 0.01
    assert (out.double() - truth).abs().max() / truth.abs().max() < TOLERANCES[torch.float32]


def test_what_is_kept_of_sealed_tokens_is_not_a_copy(level: Library) -> None:
    """Factors of another dtype are converted for every call anew: those that they were made of may change."""
    made = make(Case(sealed=100, rotary_dim=16, device="cpu"))
    up = made.inputs.factors.v.up.double()
    factors = replace(made.inputs.factors, v=replace(made.inputs.factors.v, up=up))
    told = made.told(factors=factors)
    before = run(told, level)
    up.mul_(2)
    assert not torch.allclose(run(told, level), before)


def test_nothing_is_kept_of_a_cache_that_is_gone() -> None:
    assert BEST is not None
    made = make(Case(sealed=100, rotary_dim=16, device="cpu"))
    run(made, BEST)
    run(made, BEST)
    alive = [weakref.ref(part) for part in (made.inputs.view.k, made.inputs.rotation.cos, made.inputs.factors)]  # type: ignore[union-attr]
    del made
    gc.collect()
    assert [part() for part in alive] == [None] * 3


def test_tensors_that_are_not_packed_together_are_read_where_they_lie(level: Library) -> None:
    made = make(Case(sealed=70, new=2, rotary_dim=16, mask="bool", sinks=True, bias=True, device="cpu"))
    inputs, mask = made.inputs, made.inputs.logits.mask
    assert mask is not None

    def strided(part: Tensor) -> Tensor:
        return torch.stack([part, part + 7], dim=-1)[..., 0]

    view = replace(inputs.view, keys=strided(inputs.view.keys), values=inputs.view.values.mT.contiguous().mT)
    factors = LayerFactors(*(replace(part, up=strided(part.up)) for part in (inputs.factors.k, inputs.factors.v)))
    logits = replace(inputs.logits, mask=strided(mask.float()).bool().mT.contiguous().mT)
    apart = replace(made, query=strided(made.query), inputs=replace(inputs, view=view, factors=factors, logits=logits))
    assert torch.equal(run(apart, level), run(made, level))


def test_angles_biases_and_norms_may_be_of_other_dtypes(level: Library) -> None:
    made = make(Case(sealed=70, rotary_dim=16, bias=True, norm=True, dtype=torch.bfloat16, device="cpu"))
    rope, factors = made.inputs.rotation, made.inputs.factors
    assert rope is not None
    wide = LayerFactors(factors.k.to(dtype=torch.float32), replace(factors.v, bias=factors.v.bias.float()))  # type: ignore[union-attr]
    others = made.told(rotation=rope.to(torch.float32), factors=wide)
    assert torch.equal(run(others, level), run(made, level))


def test_nothing_sealed(level: Library) -> None:
    made = make(Case(softcap=2.0, sinks=True, device="cpu"))
    made = made.told(view=View(made.inputs.view.keys, made.inputs.view.values))
    assert torch.allclose(run(made, level), by_torch(made), atol=1e-6)


REFUSED = {
    "normalise keys by head and rotate them by halves": Case(rotary_dim=16),
    "65 new tokens are too many": Case(new=65, recent=65),
    "16 or 32 bits": Case(dtype=torch.float64),
    "groups of keys": Case(),
    "do not normalise values": Case(),
    "no keys in 8 bits": Case(rotary_dim=16),
    "record no gradients": Case(),
    "need a CPU": Case(),
    "masks of 16 or 32 bits": Case(mask="added"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_what_it_refuses(reason: str) -> None:
    made = make(replace(REFUSED[reason], device="cpu"))
    factors, rope = made.inputs.factors, made.inputs.rotation
    if rope is not None and reason.startswith("normalise keys"):
        made = made.told(rotation=replace(rope, is_plain=False))
    if reason == "groups of keys":
        made = made.told(factors=LayerFactors(factors.k, replace(factors.v, up=factors.v.up[:, :10])))
    if reason == "do not normalise values":
        made = made.told(value_heads=torch.nn.Identity())
    if reason == "no keys in 8 bits":
        made = made.told(int8_keys=Int8Keys.of(factors.k))
    if reason == "need a CPU":
        made = replace(made, query=made.query.to("meta"))
    if reason == "masks of 16 or 32 bits":
        mask = made.inputs.logits.mask
        assert mask is not None
        made = made.told(logits=replace(made.inputs.logits, mask=mask.double()))
    if reason == "record no gradients":
        made.query.requires_grad_()
    refused = made.by(launch.refusal)
    assert refused is not None
    assert reason in refused


def test_what_is_not_in_the_same_pages_is_refused() -> None:
    view = ROTATED.paged()
    assert isinstance(view.v, PagedLatents)
    others = [replace(view.v, table=view.v.table.clone()), PlainLatents(view.v.read())]
    for v in others:
        refused = launch.refusal(ROTATED.query(), ROTATED.inputs(view=replace(view, v=v)))
        assert refused is not None
        assert "by one table of pages" in refused


def test_the_dispatch_takes_the_kernels() -> None:
    made = make(Case(sealed=100, rotary_dim=16, device="cpu"))
    assert BEST is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = [attention(made.query, made.inputs, backend=backend) for backend in ("cpu", "auto")]
    for out in outputs:
        assert torch.equal(out, run(made, BEST))


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_what_they_cannot_do_is_said_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(Case(sealed=100, rotary_dim=16, device="cpu"))
    launch._say_once.cache_clear()
    monkeypatch.setattr(launch, "refusal", lambda *_: "it is Tuesday")
    with pytest.warns(UserWarning, match="by torch, not by the CPU kernels: it is Tuesday"):
        first = attention(made.query, made.inputs, backend=backend)
    assert torch.equal(first, attention(made.query, made.inputs, backend=backend))
    assert torch.equal(first, by_torch(made))
    launch._say_once.cache_clear()


def test_without_kernels_torch_does_it_and_only_who_asked_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(Case(sealed=100, rotary_dim=16, device="cpu"))
    monkeypatch.setattr(launch, "library", lambda: None)
    monkeypatch.setattr(launch, "lacking", lambda: "they are not there")
    assert torch.equal(attention(made.query, made.inputs), by_torch(made))
    launch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="by torch, not by the CPU kernels: they are not there"):
        assert torch.equal(attention(made.query, made.inputs, backend="cpu"), by_torch(made))
    launch._say_once.cache_clear()


def test_threads_that_generate_at_once_do_not_disturb_each_other() -> None:
    """Each has scratch memory of its own, as the threads of a model have."""
    assert BEST is not None
    cases = [replace(CASES[name], device="cpu") for name in ("bfloat16, rotated", "4 bits", "rotated", "many rows")]
    mades = [make(case) for case in cases]
    expected, wrong = [run(made, BEST) for made in mades], []

    def generate(made: Made, truth: Tensor) -> None:
        scratch = Scratch()
        for _ in range(100):
            if not torch.equal(launch.attention(made.query, made.inputs, scratch, BEST), truth):
                wrong.append(made)

    threads = [threading.Thread(target=generate, args=pair) for pair in zip(mades, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tiles_of_the_processor_are_left_as_they_were() -> None:
    """Torch's own products of 16-bit numbers configure the same registers; they come right after a call."""
    assert BEST is not None
    made = make(Case(sealed=300, dtype=torch.bfloat16, rotary_dim=16, device="cpu"))
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    expected = a @ b
    for _ in range(20):
        run(made, BEST)
        assert torch.equal(a @ b, expected)


@pytest.mark.parametrize("told", [{}, {"softcap": 0.7, "sinks": True}])
def test_large_pages_of_an_8b_layer(told: dict) -> None:
    assert BEST is not None
    problem = PagedProblem(
        q_heads=32, kv_heads=8, head_dim=128, k_rank=205, v_rank=205, recent=37, rotary=128, block_size=16,
        lengths=(800, 0, 1, 433, 33), above=100, **KIVI,
    )  # fmt: skip
    check_paged(problem, torch.bfloat16, BEST, **told)


def test_no_scratch_is_too_small() -> None:
    """Memory grows to what the largest call took, and a smaller one takes no more."""
    assert BEST is not None
    scratch, sizes = Scratch(), []
    for sealed in (10, 500, 20):
        made = make(Case(sealed=sealed, device="cpu"))
        launch.attention(made.query, made.inputs, scratch, BEST)
        sizes.append(scratch.nbytes())
    assert 0 < sizes[0] < sizes[1] == sizes[2]


def test_logits_of_minus_infinity_everywhere_read_nothing() -> None:
    assert BEST is not None
    problem = replace(ABSORBED, lengths=(0, 40), device="cpu")
    mask = torch.zeros(2, 1, 1, problem.sealed + problem.recent, dtype=torch.bool)
    mask[1] = True
    inputs = problem.inputs(Logits(0.25, mask=mask))
    out = launch.attention(problem.query(), inputs, NaNScratch(), BEST)
    assert not out[0].any()
    assert out[1].abs().sum() > 0

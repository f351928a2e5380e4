"""The Triton kernels against the reference in fp64: on a GPU where there is one, else interpreted on the CPU.

Memory that the launcher allocates is filled with NaN first, so that a number that no program wrote shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cskv.attention.attend import attends_to_latents, attention
from cskv.attention.int8_keys import Int8Keys
from cskv.attention.triton.plan import Plan
from cskv.factorization.factors import LayerFactors
from cskv.latents.view import PlainLatents, View
from tests.attention.cases import CASES, Case, by_torch, grid, make, plain_rope
from tests.interpreter import mend_interpreter

pytest.importorskip("triton")
mend_interpreter()

from cskv.attention.triton import arguments, launch, refusal  # noqa: E402

# Of the largest output, which is about 1. In 16 bits, absorbed queries, rebuilt keys and weights are each rounded once.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def check(case: Case) -> None:
    made = make(case)
    assert made.by(launch.refusal) is None
    out, truth = made.by(launch.attention), made.truth()
    assert out.dtype == case.dtype
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < TOLERANCES[case.dtype], error


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    check(CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rotary_dim", [None, 64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_at_real_sizes(dtype: torch.dtype, rotary_dim: int | None, packed: bool) -> None:
    k, v = (grid(205, 4, 32, 1), grid(205, 4, 1, 32)) if packed else (None, None)
    check(Case(8000, 37, 3, (32, 8), 1, 128, (205, 205), rotary_dim=rotary_dim, k=k, v=v, dtype=dtype))


@pytest.mark.gpu
def test_a_step_can_be_captured() -> None:
    made = make(replace(CASES["bfloat16, packed"], sealed=3000))
    made.by(launch.attention)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = made.by(launch.attention)
    made.query.copy_(made.query.flip(1))
    graph.replay()
    assert torch.equal(captured, made.by(launch.attention))


def test_factors_with_rows_further_apart_are_taken_as_they_are() -> None:
    made = make(Case(rotary_dim=16, ranks=(13, 20)))
    k = made.inputs.factors.k.aligned(16)
    assert arguments.rebuild_arguments(made.query, k, made.inputs.rotation)["up"].data_ptr() == k.up.data_ptr()
    apart = made.told(factors=LayerFactors(k, made.inputs.factors.v))
    assert torch.equal(apart.by(launch.attention), made.by(launch.attention))


def test_nothing_sealed() -> None:
    made = make(Case(softcap=2.0, sinks=True))
    made = made.told(view=View(made.inputs.view.keys, made.inputs.view.values))
    assert made.by(launch.refusal) is None
    assert torch.allclose(made.by(launch.attention), by_torch(made), atol=1e-6)


REFUSED = {
    "normalise keys by head and rotate them by halves": Case(rotary_dim=16),
    "rotate pairs": Case(rotary_dim=5),
    "65 new tokens are too many": Case(new=65, recent=65),
    "16 or 32 bits": Case(dtype=torch.float64),
    "differ in dtype": Case(),
    "groups of keys": Case(),
    "do not normalise values": Case(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_what_it_refuses(reason: str) -> None:
    made = make(REFUSED[reason])
    factors, rope = made.inputs.factors, made.inputs.rotation
    if rope is not None and reason.startswith("normalise keys"):
        made = made.told(rotation=replace(rope, is_plain=False))
    if reason == "differ in dtype":
        made = replace(made, query=made.query.half())
    if reason == "groups of keys":
        made = made.told(factors=LayerFactors(factors.k, replace(factors.v, up=factors.v.up[:, :10])))
    if reason == "do not normalise values":
        made = made.told(value_heads=torch.nn.Identity())
    refused = made.by(launch.refusal)
    assert refused is not None
    assert reason in refused


@pytest.mark.parametrize(("shared", "most"), [(1, 64), (2, 64), (4, 32), (8, 16)])
def test_as_many_new_tokens_attend_to_latents_as_the_kernels_take(shared: int, most: int) -> None:
    """Query heads that share a kv head are rows of it: with more of them, a piece of a prompt is long sooner."""
    assert attends_to_latents(most, 2 * shared, 2)
    assert not attends_to_latents(most + 1, 2 * shared, 2)
    case = Case(heads=(shared, 1), new=most, recent=most + 2, sealed=20, rotary_dim=16)
    check(case)
    assert "too many" in str(make(replace(case, new=most + 1, recent=most + 2)).by(launch.refusal))


def test_a_missing_triton_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "installed", lambda: False)
    made = make(Case())
    launch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="by torch, not triton: triton is not installed"):
        out = attention(made.query, made.inputs, backend="triton")
    assert torch.equal(out, by_torch(made))


def test_the_dispatch_takes_the_kernels() -> None:
    made = make(CASES["rotated"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attention(made.query, made.inputs, backend="triton")
    assert torch.equal(out, made.by(launch.attention))


@pytest.mark.parametrize(("rotary_dim", "kernel"), [(None, "plan_partials"), (16, "plan_scores")])
def test_a_plan_that_does_not_fit_is_made_smaller_once(
    rotary_dim: int | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    planned, fitted = getattr(launch, kernel), launch._fitted
    tried: list[tuple[int, int, int]] = []

    def small_device(name: str, chosen: Plan, launched: Callable[[Plan], object]) -> object:
        def attempt(made: Plan) -> object:
            if f"plan_{name}" == kernel:
                tried.append((made.stages, made.heads, made.tile))
                if made.tile > 16:
                    raise OutOfResources(2, 1, "shared memory")
            return launched(made)

        return fitted(name, chosen, attempt)

    monkeypatch.setattr(launch, kernel, lambda *sizes: replace(planned(*sizes), tile=32))
    monkeypatch.setattr(launch, "_fitted", small_device)
    monkeypatch.setattr(launch, "_fitting", {})
    case = Case(sealed=100, rotary_dim=rotary_dim, dtype=torch.bfloat16)
    check(case)
    heads = [(1, 2, 32), (1, 1, 32)] if rotary_dim else [(1, 1, 32)]
    assert tried == [(2, heads[0][1], 32), *heads, (1, 1, 16)]
    check(case)
    assert tried[len(heads) + 2 :] == [(1, 1, 16)]


def test_products_are_made_for_as_many_tokens_as_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(sealed=500, rotary_dim=16, batch=2, mask="bool")
    whole = make(case).by(launch.attention)
    pieces, products = [], launch._Sealed._products

    def kept(self, begin: int, end: int, rebuild: dict) -> Tensor:
        pieces.append((begin, end))
        return products(self, begin, end, rebuild)

    monkeypatch.setattr(launch._Sealed, "_products", kept)
    monkeypatch.setattr(launch, "PRODUCTS", 2 * 4 * 200)
    assert torch.allclose(make(case).by(launch.attention), whole, atol=1e-6)
    assert pieces == [(0, 192), (192, 384), (384, 500)]
    check(case)


def test_zeros_behind_the_latents_are_read_with_them() -> None:
    """Rows of 14 and 20 latents, as a buffer of a GPU keeps them; NaN behind would show."""
    made = make(Case(sealed=100))
    wide = []
    for part in (made.inputs.view.k, made.inputs.view.v):
        assert isinstance(part, PlainLatents)
        room = torch.nn.functional.pad(part.tokens, (0, 32 - part.rank))
        wide.append(PlainLatents(room[..., : part.rank], padding=32 - part.rank))
    assert [arguments.Store.of(part, 1).readable for part in wide] == [32, 32]
    padded = made.told(view=replace(made.inputs.view, k=wide[0], v=wide[1]))
    assert torch.equal(padded.by(launch.attention), made.by(launch.attention))


def test_halves_that_are_equal_are_read_once() -> None:
    made = make(Case(sealed=100, rotary_dim=16))
    rope = made.inputs.rotation
    assert rope is not None
    cos, sin = (part[..., :8].repeat(1, 1, 2) for part in (rope.cos, rope.sin))  # type: ignore[index]
    both = made.told(rotation=plain_rope(cos, sin, 16))
    one = made.told(rotation=replace(plain_rope(cos, sin, 16), is_symmetric=True))
    assert torch.equal(one.by(launch.attention), both.by(launch.attention))


# Width and rank of keys, blocks of channels of values, and whether codes are found by arithmetic.
WIDTHS = {
    "planes": (4, 64, 32, True),
    "planes that begin within a block": (4, 40, 32, True),
    "8 bits": (8, 40, 32, True),
    "2 bits": (2, 64, 16, True),
    "1 bit": (1, 64, 32, False),
    "3 bits": (3, 40, 32, False),
}


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_one_width(name: str, dtype: torch.dtype) -> None:
    bits, rank, block, by_arithmetic = WIDTHS[name]
    packed = {"k": grid(rank, bits, 16, 1), "v": grid(rank, bits, 1, block)}
    case = Case(sealed=150, batch=2, ranks=(rank, rank), rotary_dim=16, dtype=dtype, **packed)
    store = arguments.Store.of(make(case).inputs.view.k, 1)  # type: ignore[arg-type]
    assert (store.bits > 0) == store.by_planes == by_arithmetic
    check(case)
    check(replace(case, rotary_dim=None))


@pytest.mark.parametrize("rotary_dim", [None, 16])
def test_groups_whose_codes_lie_in_one_plane(rotary_dim: int | None) -> None:
    packed = {"k": grid(32, 4, 16, 1), "v": grid(48, 2, 1, 8)}
    case = Case(sealed=150, heads=(8, 4), groups=4, ranks=(8, 12), rotary_dim=rotary_dim, **packed)
    stores = [arguments.Store.of(part, 4) for part in (make(case).inputs.view.k, make(case).inputs.view.v)]  # type: ignore[arg-type]
    assert [(store.bits, store.by_planes) for store in stores] == [(4, False), (2, False)]
    check(case)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("packed", [False, True])
def test_keys_are_rebuilt_in_8_bits_as_torch_does(dtype: torch.dtype, packed: bool) -> None:
    k = grid(40, 4, 16, 1) if packed else None
    made = make(Case(sealed=150, batch=2, heads=(8, 4), ranks=(40, 20), rotary_dim=8, bias=True, k=k, dtype=dtype))
    exact = made.by(launch.attention)
    made = made.told(int8_keys=Int8Keys.of(made.inputs.factors.k))
    assert made.by(launch.refusal) is None
    out, truth = made.by(launch.attention).double(), made.truth()
    largest = truth.abs().max()
    # A number that lies between two whole ones may be rounded either way, as it is computed: a step of one latent.
    assert (out - truth).abs().max() / largest < max(TOLERANCES[dtype], 1e-3)
    assert (by_torch(made).double() - truth).abs().max() / largest < max(TOLERANCES[dtype], 1e-3)
    assert (out - exact.double()).abs().max() / largest > 1e-4  # and it is not what 16 bits give


def test_groups_are_rebuilt_in_8_bits() -> None:
    made = make(Case(sealed=150, heads=(8, 4), groups=2, ranks=(20, 20), rotary_dim=16, norm=True))
    made = made.told(int8_keys=Int8Keys.of(made.inputs.factors.k))
    truth = made.truth()
    assert (made.by(launch.attention).double() - truth).abs().max() / truth.abs().max() < 1e-3


def test_too_many_latents_for_8_bits_are_refused() -> None:
    made = make(Case(sealed=10, ranks=(600, 20), heads=(2, 1), rotary_dim=16))
    made = made.told(int8_keys=Int8Keys.of(made.inputs.factors.k))
    assert "at most 512 latents" in str(made.by(launch.refusal))

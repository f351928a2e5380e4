"""The Triton kernels against the reference in fp64: on a GPU where there is one, else interpreted on the CPU.

Memory that the launcher allocates is filled with NaN first, so that a number that no program wrote shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cskv.attention import reference
from cskv.attention.attend import attends_to_latents, attention
from cskv.attention.inputs import AttentionInputs, Logits, RMSNorm, Rotation, split_heads
from cskv.attention.int8_keys import Int8Keys
from cskv.attention.triton.plan import Plan
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.view import Latents, PackedLatents, PlainLatents, View
from cskv.quantization.grid import Grid, quantise
from tests.interpreter import mend_interpreter

pytest.importorskip("triton")
mend_interpreter()

from cskv.attention.triton import arguments, launch, refusal  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest output, which is about 1. In 16 bits, absorbed queries, rebuilt keys and weights are each rounded once.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
MIXED = Grid(((8, 3), (4, 6), (3, 4), (2, 1)), 32, 4)
pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


@dataclass(frozen=True)
class Case:
    """A layer's attention. `k` and `v` are grids, or None for plain latents."""

    sealed: int = 63
    recent: int = 5
    batch: int = 1
    heads: tuple[int, int] = (4, 2)  # query heads and kv heads
    new: int = 1
    head_dim: int = 16
    ranks: tuple[int, int] = (14, 20)  # of a group
    groups: int = 1
    rotary_dim: int | None = None  # None absorbs
    bias: bool = False
    softcap: float | None = None
    sinks: bool = False
    mask: str | None = None
    k: Grid | None = None
    v: Grid | None = None
    token_block: bool = False
    norm: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Made:
    """The arguments of attention."""

    query: Tensor
    inputs: AttentionInputs

    def by(self, attention) -> Tensor:
        return attention(self.query, self.inputs)

    def truth(self) -> Tensor:
        return reference.attention(self.query.double(), self.inputs)

    def told(self, **changes) -> Made:
        """With other inputs."""
        return replace(self, inputs=replace(self.inputs, **changes))


def by_torch(made: Made) -> Tensor:
    return attention(made.query, made.inputs, backend="torch")


def make(case: Case) -> Made:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, case.dtype)

    q_heads, kv_heads = case.heads
    kv_dim, length = kv_heads * case.head_dim, case.sealed + case.recent
    factors = []
    for rank in case.ranks:
        up = normal(kv_dim, rank) * rank**-0.5
        factors.append(Factors(normal(rank * case.groups, 8), up, normal(kv_dim) if case.bias else None))
    k, v = (
        latents(normal(case.batch, case.sealed + 3, rank * case.groups)[:, : case.sealed], grid, case)
        for rank, grid in zip(case.ranks, (case.k, case.v))
    )
    exact = [normal(case.batch, kv_heads, case.recent, case.head_dim) for _ in range(2)]
    rope = None
    if case.rotary_dim is not None:
        # Halves that differ, which no family has: they show which half of a channel pair is read.
        angles = normal(case.batch, case.sealed, case.rotary_dim).float() * 3
        norm = RMSNorm(1 + 0.3 * normal(case.head_dim), 1e-2) if case.norm else None
        rope = plain_rope(angles.cos().to(case.dtype), angles.sin().to(case.dtype), case.head_dim, norm)
    mask = mask_of(case, length)
    sinks = normal(q_heads) if case.sinks else None
    query = normal(case.batch, case.new, q_heads, case.head_dim).transpose(1, 2)
    logits = Logits(case.head_dim**-0.5, case.softcap, mask, sinks)
    return Made(query, AttentionInputs(View(exact[0], exact[1], k, v), LayerFactors(*factors), rope, logits))


def latents(values: Tensor, grid: Grid | None, case: Case) -> Latents:
    if grid is None:
        return PlainLatents(values)
    if not case.token_block:
        return PackedLatents(*quantise(values, grid), grid, case.dtype)
    cut = min(5, case.sealed)  # a crop has left a first block of 5 tokens
    parts = [quantise(part, grid) for part in (values[:, :cut], values[:, cut:]) if part.shape[1]]
    joined = [torch.cat(tensors, dim=1) for tensors in zip(*parts)]
    size = grid.block_tokens
    rows = [torch.arange(cut) // size, -(-cut // size) + torch.arange(case.sealed - cut) // size]
    return PackedLatents(*joined, grid, case.dtype, torch.cat(rows).to(DEVICE))


def plain_rope(cos: Tensor, sin: Tensor, head_dim: int, norm: RMSNorm | None = None) -> Rotation:
    def heads(channels: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        assert cos is not None
        assert sin is not None
        x = split_heads(channels, head_dim)
        if norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    return Rotation(cos, sin, heads, is_plain=True, norm=norm)


def mask_of(case: Case, length: int) -> Tensor | None:
    """Each query up to its own token, and without the first tokens of the last sequence: they are padding."""
    if case.mask is None:
        return None
    reads = torch.ones(case.batch, 1, case.new, length, dtype=torch.bool, device=DEVICE).tril(length - case.new)
    reads[-1, :, :, : length // 3] = False
    if case.mask == "hidden":  # all sealed tokens of the last sequence, and a head in which they are not
        reads = reads.repeat(1, case.heads[0], 1, 1)
        reads[-1, 1:, :, : case.sealed] = False
    if case.mask in ("nothing", "infinitely nothing"):  # a query that is padding itself
        reads[-1] = False
    if case.mask in ("bool", "hidden", "nothing"):
        return reads
    least = -float("inf") if case.mask in ("infinite", "infinitely nothing") else torch.finfo(case.dtype).min
    return torch.zeros(reads.shape, dtype=case.dtype, device=DEVICE).masked_fill(~reads, least)


def check(case: Case) -> None:
    made = make(case)
    assert made.by(launch.refusal) is None
    out, truth = made.by(launch.attention), made.truth()
    assert out.dtype == case.dtype
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < TOLERANCES[case.dtype], error


def grid(rank: int, bits: int, *block: int) -> Grid:
    return Grid.uniform(rank, bits, (block[0], block[1]))


CASES = {
    "absorbed": Case(sealed=500),
    "one token": Case(sealed=1),
    "one token, rotated": Case(sealed=1, rotary_dim=16),
    "rotated": Case(sealed=500, rotary_dim=16, batch=2),
    "many tokens": Case(sealed=1000, rotary_dim=16, ranks=(41, 41), bias=True),
    "partly rotated": Case(rotary_dim=8, bias=True, batch=2),
    "normalised": Case(rotary_dim=16, norm=True, batch=2, bias=True),
    "normalised, partly rotated": Case(rotary_dim=8, norm=True, heads=(8, 4), groups=2, k=grid(28, 4, 32, 1)),
    "normalised, head of no power of two": Case(rotary_dim=20, head_dim=40, heads=(2, 2), norm=True),
    "bfloat16, normalised": Case(sealed=300, dtype=torch.bfloat16, rotary_dim=16, norm=True),
    "head of no power of two": Case(rotary_dim=20, head_dim=40, heads=(2, 2)),
    "one kv head": Case(heads=(6, 1), new=3, sealed=100),
    "one kv head, rotated": Case(heads=(6, 1), new=3, rotary_dim=16),
    "every head its own": Case(heads=(3, 3), new=3, rotary_dim=16, bias=True),
    "absorbed bias": Case(bias=True, new=3, batch=2),
    "groups": Case(heads=(8, 4), groups=2, bias=True, batch=2),
    "groups, rotated": Case(heads=(8, 4), groups=2, rotary_dim=16, new=3, bias=True),
    "groups, packed": Case(heads=(8, 4), groups=2, k=grid(28, 4, 32, 1), v=grid(40, 3, 1, 32)),
    "softcap and sinks": Case(softcap=0.7, sinks=True, rotary_dim=16),
    "padding": Case(mask="bool", batch=2, new=3, sealed=100),
    "padding, added": Case(mask="added", batch=2, new=3, rotary_dim=16),
    "padding, infinite": Case(mask="infinite", batch=2, sealed=200),
    "all hidden": Case(mask="hidden", batch=2, softcap=5.0, sealed=200),
    "nothing read": Case(mask="nothing", batch=2, sealed=200),
    "nothing read, infinite": Case(mask="infinitely nothing", batch=2, sealed=200, rotary_dim=16),
    "sinks and padding": Case(mask="bool", sinks=True, rotary_dim=8, batch=2),
    "2 bits": Case(sealed=200, k=grid(14, 2, 32, 1), v=grid(20, 2, 1, 32)),
    "3 bits": Case(sealed=200, k=grid(14, 3, 32, 1), v=grid(20, 3, 32, 4), rotary_dim=16),
    "4 bits": Case(sealed=200, k=grid(14, 4, 32, 4), v=grid(20, 4, 1, 20), batch=2),
    "7 bits": Case(k=grid(14, 7, 32, 4), v=grid(20, 7, 1, 7), batch=2),
    "8 bits": Case(k=grid(14, 8, 1, 32), v=grid(20, 8, 32, 1), rotary_dim=8),
    "mixed widths": Case(sealed=100, k=MIXED, v=grid(20, 4, 1, 32), rotary_dim=16, batch=2),
    "only keys packed": Case(k=MIXED),
    "a block cut short": Case(sealed=100, k=MIXED, v=grid(20, 4, 32, 1), token_block=True, batch=2),
    "a block cut short, rotated": Case(sealed=100, v=grid(20, 4, 32, 1), token_block=True, rotary_dim=16),
    "wide": Case(ranks=(300, 520), heads=(2, 1)),
    "wide, rotated": Case(ranks=(300, 600), heads=(2, 1), rotary_dim=16, k=grid(300, 3, 32, 1)),
    "many rows": Case(ranks=(205, 300), heads=(10, 5), new=20, recent=20, sealed=70, rotary_dim=16),
    "many rows, absorbed": Case(heads=(10, 5), new=13, recent=13, sealed=70),
    "more rows of a head than a program has": Case(heads=(2, 1), new=40, recent=45, sealed=70, rotary_dim=16),
    "half": Case(sealed=500, dtype=torch.float16, rotary_dim=16, bias=True),
    "half, packed": Case(sealed=200, dtype=torch.float16, k=MIXED, v=grid(20, 4, 1, 32)),
    "bfloat16": Case(sealed=500, dtype=torch.bfloat16, bias=True),
    "bfloat16, rotated": Case(sealed=500, dtype=torch.bfloat16, rotary_dim=16, bias=True, mask="added", batch=2),
    "bfloat16, packed": Case(sealed=200, dtype=torch.bfloat16, k=MIXED, v=grid(20, 3, 1, 32), rotary_dim=8),
}


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

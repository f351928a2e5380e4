"""The Triton kernels on latents in pages, against every request by itself by the reference in fp64.

On a GPU where there is one, else interpreted on the CPU. Every byte that is no request's is NaN.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cskv.attention import reference
from cskv.attention.attend import attention
from cskv.attention.inputs import Logits
from cskv.attention.triton import launch
from cskv.latents.pages import PagedLatents, PageLayout
from cskv.latents.view import PlainLatents, View
from tests.attention.cases import DEVICE
from tests.attention.paged_cases import ABSORBED, CASES, KIVI, ROTATED
from tests.attention.problems import PagedProblem, one_by_one
from tests.interpreter import mend_interpreter

pytest.importorskip("triton")
mend_interpreter()
pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

# Of the largest output, as for latents that are not in pages.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def run(problem: PagedProblem, logits: Logits, dtype: torch.dtype = torch.float32) -> Tensor:
    """By the kernels, all requests together."""
    query, inputs = problem.query().to(dtype), problem.inputs(logits, dtype)
    assert launch.refusal(query, inputs) is None
    return launch.attention(query, inputs)


def check(problem: PagedProblem, dtype: torch.dtype = torch.float32, **told) -> None:
    logits = problem.logits(**told)
    out = run(problem, logits, dtype)
    assert out.dtype == dtype
    truth = one_by_one(reference.attention, problem, dtype, logits)
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < TOLERANCES[dtype], error


@pytest.mark.parametrize("name", CASES)
def test_together_is_one_by_one(name: str) -> None:
    problem, told = CASES[name]
    check(problem, **told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_16_bits(dtype: torch.dtype, block_size: int, packed: bool) -> None:
    check(replace(ROTATED, block_size=block_size, lengths=(0, 65, 300), **KIVI if packed else {}), dtype)


def sealed(problem: PagedProblem) -> launch.Ranges:
    inputs = problem.inputs()
    assert inputs.view.k is not None
    assert inputs.view.v is not None
    return launch.sealed_ranges(problem.query(), inputs.view.k, inputs.view.v, inputs)


@pytest.mark.parametrize("lengths", [(0, 5, 300), (0, 0, 0)])
def test_a_request_without_tokens_is_an_empty_part(lengths: tuple[int, ...]) -> None:
    ranges = sealed(replace(ROTATED, lengths=lengths, above=64))
    most, total, sums = (part.unflatten(1, (len(lengths), -1)) for part in ranges)
    for row, length in enumerate(lengths):
        if not length:
            assert (most[:, row] == -float("inf")).all()
            assert not total[:, row].any()
            assert not sums[:, row].any()
    assert torch.isfinite(total).all()
    assert torch.isfinite(sums).all()


def test_every_request_is_cut_by_its_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound far above leaves no program with all tokens: 4 ranges of 128 tokens are 32 each."""
    monkeypatch.setattr(launch, "_multiprocessors", lambda _device: 2)
    most = sealed(replace(ABSORBED, lengths=(128,), above=2000)).most
    assert most.shape[0] == 4
    assert torch.isfinite(most).all()


def test_no_length_is_above_the_bound() -> None:
    """Tokens past `most` are not read: there is no room for their cos and sin."""
    problem = replace(ROTATED, lengths=(70, 33), hides=False)
    view = problem.paged()
    assert isinstance(view.k, PagedLatents)
    longer = view.k.lengths + 16
    parts = [replace(part, lengths=longer, length=64) for part in (view.k, view.v)]  # type: ignore[type-var]
    short = replace(problem, lengths=(64, 49))
    inputs = short.inputs(view=View(view.keys, view.values, *parts))
    out = launch.attention(problem.query(), inputs)
    cut = [replace(part, lengths=longer.clamp(max=64)) for part in parts]
    expected = attention(problem.query(), replace(inputs, view=View(view.keys, view.values, *cut)), backend="torch")
    assert torch.allclose(out[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("block_size", [16, 32])
def test_pages_may_be_further_apart_than_32_bits_count(block_size: int) -> None:
    """Page 2 begins at byte 2**31 + 32 of memory that is not touched otherwise."""
    problem = replace(ABSORBED, lengths=(block_size,), block_size=block_size, k_grid=(8, (8, 1)), v_grid=(8, (8, 1)))
    view, apart = problem.paged(), 2**30 + 16
    assert isinstance(view.k, PagedLatents)
    assert isinstance(view.v, PagedLatents)
    layout = PageLayout(problem.k_rank, problem.v_rank, torch.float32, view.k.pages.grid, view.v.pages.grid)
    size = layout.page_bytes(block_size)
    far = torch.empty(2 * apart + size, dtype=torch.uint8, device=DEVICE).as_strided((3, size), (apart, 1))
    near, k = int(view.k.table[0, 0]), view.k.pages.data
    far[2] = k.view(torch.uint8).as_strided((size,), (1,), k.storage_offset() + near * k.stride(0))
    table = torch.tensor([[2]], device=DEVICE)
    parts = [PagedLatents(pages, table, view.k.lengths, block_size) for pages in layout.pages(far, block_size)]
    expected = launch.attention(problem.query(), problem.inputs(view=view))
    inputs = problem.inputs(view=replace(view, k=parts[0], v=parts[1]))
    assert torch.equal(launch.attention(problem.query(), inputs), expected)


def test_what_is_not_in_the_same_pages_is_refused() -> None:
    problem = ROTATED
    view = problem.paged()
    assert isinstance(view.v, PagedLatents)
    others = [
        replace(view.v, table=view.v.table.clone()),
        replace(view.v, lengths=view.v.lengths.clone()),
        PlainLatents(view.v.read()),
    ]
    for v in others:
        refused = launch.refusal(problem.query(), problem.inputs(view=replace(view, v=v)))
        assert refused is not None
        assert "by one table of pages" in refused
    assert "differ in dtype" in str(launch.refusal(problem.query().half(), problem.inputs(view=view)))


def layer(dtype: torch.dtype, packed: bool, rotary: int | None, block_size: int) -> PagedProblem:
    """A layer of an 8B model."""
    grids = {"k_grid": (4, (16, 1)), "v_grid": (4, (1, 32))} if packed else {}
    return PagedProblem(
        q_heads=32, kv_heads=8, head_dim=128, k_rank=205, v_rank=205, recent=37, rotary=rotary, device=DEVICE,
        lengths=(8000, 0, 1, 4097, 333), block_size=block_size, above=1000, **grids,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rotary", [None, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_together_is_one_by_one_at_real_sizes(dtype: torch.dtype, rotary: int | None, packed: bool) -> None:
    for block_size in (16, 64) if dtype == torch.bfloat16 else (64,):
        check(layer(dtype, packed, rotary, block_size), dtype)


@pytest.mark.gpu
def test_a_captured_step_follows_the_lengths_and_the_table() -> None:
    """A capture fails where anything waits for the device."""
    dtype, problem = torch.bfloat16, replace(ROTATED, lengths=(3000, 0, 65), hides=False)
    query, inputs = problem.query().to(dtype), problem.inputs(dtype=dtype)
    view = inputs.view
    assert isinstance(view.k, PagedLatents)
    launch.attention(query, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch.attention(query, inputs)
    view.k.lengths.copy_(view.k.lengths.flip(0))
    view.k.table.copy_(view.k.table.flip(0))
    graph.replay()
    assert torch.equal(captured, launch.attention(query, inputs))
    assert torch.isfinite(captured).all()

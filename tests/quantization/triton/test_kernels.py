"""The Triton kernels give the bits of the grid: on a GPU where there is one, else interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskv.quantization import dispatch
from cskv.quantization.grid import Grid, quantise
from tests.interpreter import mend_interpreter

pytest.importorskip("triton")
mend_interpreter()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 15)), min_size=1, max_size=3).map(tuple)


@pytest.fixture(autouse=True, scope="module")
def _full_new_memory() -> Iterator[None]:
    """Bytes that no program writes are not zero by chance."""
    new_empty = Tensor.new_empty
    patch = pytest.MonkeyPatch()
    patch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(93))
    yield
    patch.undo()


def check(latents: Tensor, grid: Grid) -> None:
    made = dispatch.by_kernels(latents.to(DEVICE), grid)
    for part, true in zip(made, quantise(latents, grid)):
        assert part.dtype == true.dtype
        assert torch.equal(part.cpu(), true)


@settings(max_examples=25)
@given(
    WIDTHS, st.sampled_from([(32, 1), (1, 32), (32, 4), (1, 1), (3, 5)]), st.integers(1, 3), st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-8, 1e-3, 1.0, 1e4]), st.floats(-5, 5), st.integers(0, 2**31),
)  # fmt: skip
@example(((4, 205),), (32, 1), 1, 63, torch.bfloat16, 1.0, 0.0, 0)
@example(((3, 130),), (1, 32), 2, 63, torch.bfloat16, 1.0, 0.0, 0)
@example(((8, 3), (4, 6), (3, 4), (2, 1)), (32, 4), 2, 500, torch.float32, 1.0, 3.0, 0)
@example(((2, 5),), (32, 1), 1, 1000, torch.float32, 1.0, 0.0, 0)
@example(((1, 7),), (32, 4), 1, 1, torch.float32, 1.0, 0.0, 0)
def test_bits_are_those_of_the_grid(
    widths: tuple[tuple[int, int], ...], block: tuple[int, int], batch: int, tokens: int, dtype: torch.dtype,
    scale: float, offset: float, seed: int,
) -> None:  # fmt: skip
    grid = Grid(widths, *block)
    latents = torch.randn(batch, tokens, grid.rank, generator=torch.Generator().manual_seed(seed))
    check(((latents + offset) * scale).clamp(-6e4, 6e4).to(dtype), grid)  # finite in fp16


@pytest.mark.parametrize("value", [0.0, 1.0, -7.3, 1e4, 1e-8, -1e-8, 1e30, -1e-42, 1e-42])
def test_constant_blocks(value: float) -> None:
    check(torch.full((1, 40, 5), value), Grid.uniform(5, 4, (32, 1)))


def test_codes_half_way_are_rounded_to_even() -> None:
    latents = torch.tensor([0, 0.5, 1.5, 2.5, 14.5, 15.0])[None, :, None]
    assert dispatch.by_kernels(latents.to(DEVICE), Grid.uniform(1, 4, (32, 1)))[0].flatten().tolist() == [
        0,
        0,
        2,
        2,
        14,
        15,
    ]


def test_rows_that_are_not_contiguous() -> None:
    latents = torch.randn(2, 14, 40, generator=torch.Generator().manual_seed(0))
    check(latents.transpose(1, 2)[:, 3:37], Grid.uniform(14, 3, (32, 4)))
    check(torch.cat([latents, latents], dim=2).transpose(1, 2)[..., :9], Grid.uniform(9, 2, (1, 32)))


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(32, 1), (1, 32), (1, 205)])
def test_sealing_takes_the_kernels_on_a_gpu(block: tuple[int, int]) -> None:
    latents = torch.randn(2, 4096, 205, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = Grid.uniform(205, 3, block)
    for part, by_torch, true in zip(
        dispatch.quantise(latents.cuda(), grid), quantise(latents.cuda(), grid), quantise(latents, grid)
    ):
        assert torch.equal(part.cpu(), true)
        assert torch.equal(by_torch.cpu(), true)

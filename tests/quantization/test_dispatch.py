"""Who seals latents."""

from __future__ import annotations

import pytest
import torch

from cskv.quantization import dispatch
from cskv.quantization.grid import Grid, Quantised, quantise

GRID = Grid.uniform(6, 4, (4, 1))
LATENTS = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))


def test_a_cpu_takes_torch() -> None:
    for part, expected in zip(dispatch.quantise(LATENTS, GRID), quantise(LATENTS, GRID)):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_takes_triton_where_it_is(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(dispatch, "installed", lambda: installed)
    kernels = Quantised(*(part + 1 for part in quantise(LATENTS, GRID)))
    monkeypatch.setattr(dispatch, "by_kernels", lambda *_: kernels)
    expected = kernels if installed else quantise(LATENTS, GRID)
    for part, own in zip(dispatch.quantise(LATENTS, GRID), expected):
        assert torch.equal(part, own)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("grid", [GRID, Grid(((2, 2), (3, 4)), 2, 3)], ids=["one width", "two"])
def test_a_compiler_is_told_the_right_shapes(grid: Grid, tokens: int) -> None:
    bits, channels = zip(*grid.widths, strict=True)
    given = LATENTS[:, :tokens], list(bits), list(channels), grid.block_tokens, grid.block_channels
    torch.library.opcheck(torch.ops.cskv.quantise.default, given, test_utils=("test_schema", "test_faketensor"))
    for part, expected in zip(torch.ops.cskv.quantise(*given), quantise(LATENTS[:, :tokens], grid), strict=True):
        assert torch.equal(part, expected)

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

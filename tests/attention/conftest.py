"""What the tests of the Triton kernels share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a launcher allocates is full of NaN, so that a number that no program wrote shows."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def filled(part: Tensor) -> Tensor:
        return part.fill_(float("nan")) if part.is_floating_point() else part

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: filled(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))

"""A small model, little text, and ways to spend a budget on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cskv import CSKVConfig
from cskv.compression.budget import Allocation, Budget, allocate
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import tiny_model

QUICK = CSKVConfig(window=0, group=4, sinks=1)

Spend = Callable[..., Allocation]


def samples(number: int = 4, length: int = 160) -> list[Tensor]:
    return list(torch.randint(3, 96, (number, length), generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def spend() -> Spend:
    """Spend a budget on a small model and little text."""
    small = tiny_model("qwen2")
    known = statistics_of(small)

    def run(changes: dict | None = None, ranks_only: bool = False, **budget: float) -> Allocation:
        config = replace(QUICK, **(changes or {}))
        return allocate(small, config, known, samples(2, 40), Budget(**budget), ranks_only=ranks_only)

    run.model = small  # type: ignore[attr-defined]
    return run

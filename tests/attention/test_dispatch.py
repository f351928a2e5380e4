"""Which backend does the work, and what is said when it cannot."""

from __future__ import annotations

import pytest
import torch

import cskv
from cskv.attention import dispatch, reference, tiled
from cskv.attention.dispatch import attention
from cskv.attention.triton import launch
from tests.attention.problems import Problem

PROBLEM = Problem()


def attend(backend: str) -> torch.Tensor:
    return attention(PROBLEM.query(), PROBLEM.inputs(), backend=backend)


def test_auto_on_a_cpu_is_torch_and_silent() -> None:
    expected = tiled.attention(PROBLEM.query(), PROBLEM.inputs())
    assert torch.equal(attend("auto"), expected)
    assert torch.equal(attend("torch"), expected)


def test_the_reference_can_be_asked_for() -> None:
    assert torch.equal(attend("reference"), reference.attention(PROBLEM.query(), PROBLEM.inputs()))


def test_an_unknown_backend_is_one_line() -> None:
    with pytest.raises(cskv.ConfigError, match="attention is 'flash'; expected one of auto, triton, torch, reference"):
        attend("flash")


def test_what_a_backend_cannot_do_falls_to_the_next_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._say_once.cache_clear()
    monkeypatch.setattr(launch, "refusal", lambda *_: "it is Tuesday")
    with pytest.warns(UserWarning, match="by torch, not triton: it is Tuesday"):
        first = attend("triton")
    assert torch.equal(first, attend("triton"))  # and no second warning, which would be an error here
    assert torch.equal(first, attend("torch"))
    dispatch._say_once.cache_clear()

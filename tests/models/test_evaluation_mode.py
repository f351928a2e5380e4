"""A model is as it was, bit for bit, after something of ours has run it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cskv
from cskv.calibration.calibrate import calibrate
from cskv.models.compat import cache_kwarg, output_cache
from cskv.models.evaluation_mode import evaluation_mode, is_rotary_embedding
from cskv.models.survey import survey
from tests.models.families import full_rank_adapter, tiny_model

RESCALED = ("llama-dynamic-rope", "phi3-longrope")  # whose embeddings change with the lengths that they see


def attach_and_detach(model: nn.Module) -> None:
    cskv.attach(model, full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0))).detach()


def calibrate_on_little(model: nn.Module) -> None:
    calibrate(model, [torch.arange(3, 13)], cskv.CSKVConfig(window=0, group=4, sinks=0))


def state(model: nn.Module) -> dict[str, dict[str, object]]:
    """Every buffer and plain attribute of the rotary embeddings, tensors as lists."""
    held = {}
    for name, module in model.named_modules():
        if is_rotary_embedding(module):
            values = vars(module) | module._buffers
            values = {key: value for key, value in values.items() if not key.startswith("_") and key != "config"}
            held[name] = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in values.items()}
    return held


@torch.no_grad()
def next_logits(model: nn.Module, between: Callable[[nn.Module], object] = lambda model: None) -> Tensor:
    """The logits of a token after a long text, with something done between the two."""
    ids = torch.randint(3, 90, (1, 81), generator=torch.Generator().manual_seed(1))
    cache = output_cache(model(ids[:, :80], use_cache=True))
    between(model)
    return model(ids[:, 80:], use_cache=True, **{cache_kwarg(model): cache}).logits


@pytest.mark.parametrize("family", RESCALED)
@pytest.mark.parametrize("use", [attach_and_detach, calibrate_on_little, lambda model: survey(model).recipes])
def test_the_frequencies_of_a_bare_model_come_back(family: str, use: Callable[[nn.Module], object]) -> None:
    model = tiny_model(family)
    assert torch.equal(next_logits(model, use), next_logits(tiny_model(family)))
    before = state(model)
    use(model)
    assert state(model) == before


@pytest.mark.parametrize("family", RESCALED)
def test_frequencies_are_what_they_were_after_a_longer_text(family: str) -> None:
    model = tiny_model(family)
    before = state(model)
    with torch.no_grad(), evaluation_mode(model):
        model(torch.ones(1, 200, dtype=torch.long))
        assert state(model) != before
    assert state(model) == before


def test_modes_come_back_after_an_error() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    with pytest.raises(ValueError, match="mine"), evaluation_mode(model):
        assert not model.training
        raise ValueError("mine")
    assert model.training
    assert not model.model.layers[1].mlp.training

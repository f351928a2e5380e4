"""Keys of old tokens rebuilt by 8-bit products, in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

import cskv
from cskv.compression.initialise import initialise
from cskv.errors import ConfigError
from cskv.models.compat import cache_kwarg
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import tiny_model, truncated_adapter

PROMPT = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    """Of some steps after a prompt of which most is compressed."""
    with torch.no_grad():
        cache: dict[str, Cache] = {cache_kwarg(model): DynamicCache(config=model.config)}
        model(PROMPT[:, :30], **cache)
        found = [model(token, **cache).logits for token in PROMPT[:, 30:].split(1, dim=1)]
    return torch.cat(found, dim=1)


def test_they_differ_from_exact_ones_by_little() -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, cskv.CSKVConfig(0.6, 0.6, window=4, group=4, sinks=2))
    found = {}
    for backend in ("torch", "reference"):
        for in_int8 in (False, True):
            with cskv.attach(model, adapter, attention=backend, int8_keys=in_int8):
                found[backend, in_int8] = logits(model)
    exact, rounded = found["torch", False], found["torch", True]
    assert torch.allclose(rounded, found["reference", True], atol=1e-4)
    assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 0.02


def test_keys_that_are_not_rebuilt_stay_as_they_are() -> None:
    model = tiny_model("llama")
    config = cskv.CSKVConfig(0.6, 0.6, window=4, group=4, init="pca", key_factors="commuting")
    adapter = initialise(model, config, statistics_of(model))
    with cskv.attach(model, adapter):
        exact = logits(model)
    with cskv.attach(model, adapter, int8_keys=True):
        assert torch.equal(logits(model), exact)


def test_the_models_own_function_gets_keys_in_full() -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, cskv.CSKVConfig(0.6, 0.6))
    with pytest.raises(ConfigError, match="int8_keys with attention='rebuild'"):
        cskv.attach(model, adapter, attention="rebuild", int8_keys=True)

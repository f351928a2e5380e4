"""The first tokens of a sequence stay exact: nothing is lost at full rank, and they are not with factors of garbage."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

import cskv
from cskv import CSKVConfig
from cskv.attachment.attach import attachment_of
from cskv.attachment.cache_bytes import adapter_report
from cskv.attachment.layer import CSKVLayer
from cskv.models.compat import cache_kwarg, output_cache
from tests.attachment.test_generation_modes import MODES, PROMPT
from tests.models.families import full_rank_adapter, tiny_model

SETTINGS = {
    "one": CSKVConfig(1.0, 1.0, window=0, group=4, sinks=1),
    "four": CSKVConfig(1.0, 1.0, window=3, group=4, sinks=4),
    "more than the prompt": CSKVConfig(1.0, 1.0, window=0, group=1, sinks=30),
}
TEXT = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("attention", ["auto", "rebuild", "reference"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_full_rank_changes_no_token(name: str, attention: str, mode: Callable[[nn.Module], Tensor]) -> None:
    model = tiny_model(name)
    expected = mode(model)
    for settings in SETTINGS.values():
        with cskv.attach(model, full_rank_adapter(model, settings), attention=attention):
            assert torch.equal(mode(model), expected), settings


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_nor_does_it_where_a_mask_is_always_given(implementation: str, mode: Callable[[nn.Module], Tensor]) -> None:
    model = tiny_model("llama-dynamic-rope", attn_implementation=implementation)
    expected = mode(model)
    model = tiny_model("llama-dynamic-rope", attn_implementation=implementation)
    with cskv.attach(model, full_rank_adapter(model, SETTINGS["four"])):
        assert torch.equal(mode(model), expected)


def cached(model: nn.Module, tokens: Tensor, prefill: int = 40) -> Cache:
    """The cache of a text, its end read token by token."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :prefill], **{cache_kwarg(model): cache})
    for t in range(prefill, tokens.shape[1]):
        model(tokens[:, t : t + 1], **{cache_kwarg(model): cache})
    return cache


@torch.no_grad()
def continued(model: nn.Module, change: Callable[[Cache], None], steps: int = 12) -> Tensor:
    cache = cached(model, TEXT)
    change(cache)
    rows = cache.layers[0].store.batch if isinstance(cache.layers[0], CSKVLayer) else cache.layers[0].keys.shape[0]
    tokens = TEXT[:1, :steps].expand(rows, -1)
    logits = [model(tokens[:, t : t + 1], **{cache_kwarg(model): cache}).logits for t in range(steps)]
    return torch.cat(logits, dim=1)


CHANGES: dict[str, Callable[[Cache], None]] = {
    "crop in the window": lambda cache: cache.crop(-2),
    "crop in sealed tokens": lambda cache: cache.crop(-41),
    "crop to the sinks": lambda cache: cache.crop(-56),
    "crop into the sinks": lambda cache: cache.crop(-58),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("settings", list(SETTINGS))
def test_a_changed_cache_goes_on_as_the_uncompressed_one(change: str, settings: str) -> None:
    model = tiny_model("llama")
    expected = continued(model, CHANGES[change])
    with cskv.attach(model, full_rank_adapter(model, SETTINGS[settings])):
        found = continued(model, CHANGES[change])
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_prefix_is_used_again_by_copies_of_its_cache() -> None:
    model = tiny_model("llama")
    with cskv.attach(model, full_rank_adapter(model, SETTINGS["four"])), torch.no_grad():
        prefix = output_cache(model(PROMPT, use_cache=True))
        for tail in ([[11, 12, 13]], [[50, 51, 52]]):
            tokens = torch.tensor(tail)
            found = model(tokens, **{cache_kwarg(model): copy.deepcopy(prefix)}).logits
            expected = model(torch.cat([PROMPT, tokens], dim=1)).logits[:, -3:]
            assert torch.allclose(found, expected, atol=1e-3)


def garbage(model: nn.Module) -> cskv.CSKVAdapter:
    adapter = full_rank_adapter(model, replace(SETTINGS["four"], group=1))
    with torch.no_grad():
        for index in adapter.layer_indices:
            for part in (adapter.factors(index).k, adapter.factors(index).v):
                part.up.normal_()
    return adapter


@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_sinks_are_read_as_they_were_written(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(TEXT)
    mask[1, :padding] = 0
    exact = model(TEXT[:, :40], attention_mask=mask[:, :40], use_cache=True)
    sinks = [torch.tensor([0, 1, 2, 3]), padding + torch.tensor([0, 1, 2, 3])]
    handed: list[tuple[Tensor, Tensor]] = []
    update, attend = CSKVLayer.update, cskv.attachment.step.attention

    def keep(layer: CSKVLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        handed.append(update(layer, *args, **kwargs))
        return handed[-1]

    def note(query: Tensor, inputs: Any, **kwargs: Any) -> Tensor:
        handed.append((inputs.view.keys, inputs.view.values))
        return attend(query, inputs, **kwargs)

    monkeypatch.setattr(CSKVLayer, "update", keep)
    monkeypatch.setattr("cskv.attachment.step.attention", note)
    for attention in ("rebuild", "torch"):
        with cskv.attach(model, garbage(model), attention=attention):
            cache = output_cache(model(TEXT[:, :40], attention_mask=mask[:, :40], use_cache=True))
            handed.clear()
            model(TEXT[:, 40:41], attention_mask=mask[:, :41], **{cache_kwarg(model): cache})
        parts = handed if attention == "rebuild" else handed[1::2]  # ours, and after it what it is given
        assert len(parts) == len(exact.past_key_values.layers)
        for layer, (keys, values) in zip(exact.past_key_values.layers, parts):
            for row, columns in enumerate(sinks):
                places = columns if attention == "rebuild" else torch.arange(4)
                assert torch.equal(keys[row][:, places], layer.keys[row][:, columns])
                assert torch.equal(values[row][:, places], layer.values[row][:, columns])
                old = columns + 4  # which are not: the factors are garbage
                if attention == "rebuild":
                    assert (keys[row][:, old] - layer.keys[row][:, old]).abs().max() > 0.1


def test_bytes_count_the_sinks() -> None:
    model = tiny_model("llama")
    adapter = full_rank_adapter(model, CSKVConfig(0.5, 0.5, window=2, group=8)).with_settings(sinks=5)
    with cskv.attach(model, adapter), torch.no_grad():
        report = cskv.cache_report(output_cache(model(TEXT, use_cache=True)), model)
    sealed, layers, kv_dim, rank = (60 - 5 - 2) // 8 * 8, 2, 32, 32
    assert report.payload_bytes == 2 * sealed * layers * 2 * rank * 4
    assert report.window_bytes == 2 * layers * 2 * ((60 - sealed) * kv_dim + (60 - sealed - 5) * rank) * 4
    predicted = adapter_report(adapter, 60, torch.float32)
    assert 2 * predicted.window_bytes == report.window_bytes
    assert 2 * predicted.payload_bytes == report.payload_bytes
    assert adapter_report(adapter, 3, torch.float32).window_bytes == layers * 2 * 3 * kv_dim * 4


def test_the_workspace_is_empty_once_detached() -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(TEXT)
    mask[0, :9] = 0
    with cskv.attach(model, full_rank_adapter(model, SETTINGS["four"])), torch.no_grad():
        workspace = attachment_of(model).workspace
        cache = output_cache(model(TEXT[:, :50], attention_mask=mask[:, :50], use_cache=True))
        sizes = []
        for t in range(50, 54):
            model(TEXT[:, t : t + 1], attention_mask=mask[:, : t + 1], **{cache_kwarg(model): cache})
            sizes.append(workspace.nbytes())
        assert sizes[-1] - sizes[1] <= 2 * 2 * (8 + 1 + 2 * 16 * 4) * 4  # two tokens more of two rows at most
    assert workspace.nbytes() == 0

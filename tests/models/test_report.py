"""Bytes: measured from the tensors that a cache holds, never from its settings."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cskv
from cskv import CSKVConfig
from cskv.models.compat import output_cache
from tests.models.families import tiny_model, truncated_adapter

# The shape ratios of an 8B model: 8 kv heads, 4 query heads for each, kv_dim a quarter of the hidden size.
EIGHT_B_RATIOS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 16384,
}


def storages(cache: Any) -> dict[int, int]:
    """All tensor storages reachable from a cache, found by the garbage collector rather than by our own accounting."""
    seen: set[int] = set()
    queue, found = [cache], {}
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (list, dict, tuple, set)) or type(item).__module__.startswith(("cskv", "transformers")):
            queue.extend(gc.get_referents(item))
    return found


def test_8k_tokens_at_20_percent_are_held_in_22_percent_of_the_bytes() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**EIGHT_B_RATIOS)).to(torch.bfloat16).eval()
    tokens = torch.randint(0, 64, (1, 8192))
    with torch.no_grad():
        adapter = truncated_adapter(model.float(), CSKVConfig(0.2, 0.2, window=32, group=32))
        model.to(torch.bfloat16)
        with cskv.attach(model, adapter):
            cache = output_cache(model.model(tokens, use_cache=True))
    report = cskv.cache_report(cache, model)
    held = sum(storages(cache).values())
    uncompressed = 8192 * 2 * 256 * 2 * model.config.num_hidden_layers  # tokens, K and V, kv_dim, bytes, layers
    assert report.uncompressed_bytes == uncompressed
    assert report.total_bytes == held
    assert held - report.window_bytes <= 0.22 * uncompressed
    assert report.window_bytes <= 63 / 8192 * uncompressed
    assert report.slack_bytes <= 0.10 * report.payload_bytes


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3-longrope"])
def test_the_report_counts_every_tensor_held(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.randint(3, 96, (2, 50), generator=torch.Generator().manual_seed(0))
    with cskv.attach(model, truncated_adapter(model, CSKVConfig(0.5, 0.25, window=2, group=4))), torch.no_grad():
        outputs = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=9,
            min_new_tokens=9,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    cache = output_cache(outputs)
    report = cskv.cache_report(cache, model)
    assert (report.batch, report.tokens) == (2, 58)
    constants = {
        layer._sliding_window_tensor.untyped_storage().data_ptr()
        for layer in cache.layers
        if hasattr(layer, "_sliding_window_tensor")
    }
    held = storages(cache)
    assert report.total_bytes == sum(size for address, size in held.items() if address not in constants)


def test_an_ordinary_cache_is_its_own_baseline() -> None:
    model = tiny_model("llama")
    tokens = torch.arange(3, 23)[None]
    report = cskv.cache_report(output_cache(model(tokens, use_cache=True)), model)
    assert report.total_bytes == report.uncompressed_bytes == 20 * 2 * 32 * 4 * 2
    assert report.ratio == 1.0
    assert report.bytes_per_token == 2 * 32 * 4 * 2
    assert report.to_dict()["other_bytes"] == report.total_bytes

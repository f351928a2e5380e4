"""What vLLM's block pool holds: more tokens in the same bytes, shared prefixes, requests that are preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import cskv
from tests.models.families import full_rank_adapter, truncated_adapter
from tests.vllm.engines import answers, engine, prompts, reused, save_base, save_compressed
from tests.vllm.test_answers import config, transformers_answer

LONG = 16_384  # exact tokens cost a request as much as 67 uncompressed ones, however long it is
TOKEN = 8 * 2 * 128 * 4  # bytes, uncompressed: layers, keys and values, channels, fp32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Eight layers, so that a block holds more than one layer's ring."""
    folder = tmp_path_factory.mktemp("pool") / "base"
    return save_base(folder, num_key_value_heads=4, num_hidden_layers=8, max_position_embeddings=LONG), folder


def tokens_in(llm: Any) -> int:
    """What vLLM logs as "KV cache size: N tokens"."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


CAPACITIES = {
    # name: (settings, what the latents take of the uncompressed bytes)
    "25 %": (config(0.25), 1 / 4),
    # Of 128 channels 32 are left, in bytes in place of fp32, and a scale and a minimum in bf16 for 32 of them.
    "25 % in int8": (config(0.25, k_bits=8, v_bits=8), (32 + 4) / 512),
    "25 % in int4": (config(0.25, k_bits=4, v_bits=4), (16 + 4) / 512),
    "25 %, sinks": (config(0.25, sinks=4), 1 / 4),
    "25 %, window": (config(0.25, window=32, group=32, sinks=4), 1 / 4),
    "25 % in int8, window": (config(0.25, window=32, group=32, sinks=4, k_bits=8, v_bits=8), (32 + 4) / 512),
}


@pytest.mark.parametrize("name", CAPACITIES)
def test_the_pool_holds_more_tokens(name: str, base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = base
    settings, share = CAPACITIES[name]
    options = {"kv_cache_memory_bytes": 2 * LONG * TOKEN, "max_model_len": LONG}
    with engine(folder, **options) as llm:
        before = tokens_in(llm)
    compressed = save_compressed(folder, truncated_adapter(model, settings), tmp_path / "out")
    with engine(compressed, **options) as llm:
        after = tokens_in(llm)
    assert 0.9 / share <= after / before <= 1.01 / share


def test_layers_of_different_ranks_share_blocks(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = base
    whole, layers = full_rank_adapter(model, config(window=8, group=8)), {}
    for i in whole.layer_indices:
        factors = whole.factors(i)
        ranks = 128 - 8 * i, 64 + 8 * i
        layers[i] = cskv.LayerFactors(
            *(cskv.Factors(f.down[:rank], f.up[:, :rank], f.bias) for f, rank in zip((factors.k, factors.v), ranks))
        )
    adapter = cskv.CSKVAdapter(whole.config, layers, whole.base)
    asked = [prompt for prompt in prompts(3, seed=2) if len(prompt) > 20]
    with cskv.attach(model, adapter):
        expected = [transformers_answer(model, prompt, 512)[0] for prompt in asked]
    with engine(save_compressed(folder, adapter, tmp_path / "out")) as llm:
        assert [answers(llm, [prompt])[0][0] for prompt in asked] == expected


def test_a_pool_too_small_for_vllm_serves_all(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = base
    options = {"kv_cache_memory_bytes": 512 * TOKEN, "max_model_len": 2048}
    with pytest.raises(Exception, match="KV cache is needed, which is larger than"), engine(folder, **options):
        pass
    adapter = truncated_adapter(model, config(0.2, window=16, group=16))
    asked = prompts(6, seed=3, longest=1500)
    with engine(save_compressed(folder, adapter, tmp_path / "out"), **options) as llm:
        assert [len(tokens) for tokens, _ in answers(llm, asked)] == [24] * 6


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (0, 4), (8, 4)])
def test_preempted_requests_answer_the_same(
    window: int, sinks: int, base: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    """At full rank: below it a request that is preempted reads its own tokens exactly again, as any prompt."""
    model, folder = base
    adapter = full_rank_adapter(model, config(window=window, group=4 if window else 1, sinks=sinks))
    compressed = save_compressed(folder, adapter, tmp_path / "out")
    asked = [prompt[:90] for prompt in prompts(6, seed=4)]
    with engine(compressed, max_model_len=256, enable_prefix_caching=False) as llm:
        expected = [tokens for tokens, _ in answers(llm, asked, 100)]
    small = {"kv_cache_memory_bytes": 400 * TOKEN, "max_model_len": 256, "disable_log_stats": False}
    with engine(compressed, block_size=16, enable_prefix_caching=False, **small) as llm:
        assert [tokens for tokens, _ in answers(llm, asked, 100)] == expected
        preempted = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preempted) > 0


def test_a_cached_prefix_is_read_from_latents(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = base
    adapter = truncated_adapter(model, config(0.5))
    prefix = prompts(1, seed=5)[0] * 3
    prefix, asked = prefix[:128], [prefix[:128] + prompt[:40] for prompt in prompts(3, seed=6)]
    with cskv.attach(model, adapter):
        expected = [transformers_answer(model, prompt, 128) for prompt in asked]  # the rest is a piece of its own
    with engine(save_compressed(folder, adapter, tmp_path / "out"), block_size=32) as llm:
        answers(llm, [prefix])
        found = [answers(llm, [prompt])[0] for prompt in asked]
        assert reused(llm, [*prefix, 5]) == 128
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=2e-3)


@pytest.mark.parametrize("settings", [config(0.5, window=8, group=8), config(0.5, sinks=4)])
def test_exact_tokens_switch_prefix_caching_off_and_say_so(
    settings: cskv.CSKVConfig, base: tuple[nn.Module, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = base
    adapter = truncated_adapter(model, settings)
    compressed = save_compressed(folder, adapter, tmp_path / "out")
    prompt = prompts(1, seed=5)[0] * 2
    with caplog.at_level("WARNING", logger="vllm.cskv"), engine(compressed, enable_prefix_caching=True) as llm:
        assert reused(llm, prompt) == reused(llm, prompt) == 0
    assert any("prefix caching is switched off" in record.message for record in caplog.records)


def test_without_sinks_an_adapter_that_has_them_shares_prefixes(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = base
    adapter = truncated_adapter(model, config(0.5, window=8, group=8, sinks=4))
    compressed = save_compressed(folder, adapter, tmp_path / "out", window=0, group=1, sinks=0)
    prompt = prompts(1, seed=5)[0][:70] * 2
    with engine(compressed, block_size=16, enable_prefix_caching=True) as llm:
        assert (reused(llm, prompt), reused(llm, prompt)) == (0, (len(prompt) - 1) // 16 * 16)

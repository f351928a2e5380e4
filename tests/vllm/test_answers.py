"""Answers of a compressed vLLM: vLLM's own where nothing is lost, those of the transformers path where something is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cskv
from tests.models.families import full_rank_adapter, truncated_adapter
from tests.vllm.engines import answers, check_same, engine, prompts, save_base, save_compressed

pytest.importorskip("vllm")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "stablelm", "glm4", "granite"]
TOKENS = 24


def config(density: float = 1.0, window: int = 0, group: int = 1, sinks: int = 0, **more: Any) -> cskv.CSKVConfig:
    sizes = {"window": window, "group": group, "sinks": sinks}
    return cskv.CSKVConfig(k_density=density, v_density=density, init="svd", **sizes, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_answers_as_vllm_does(family: str, tmp_path: Path) -> None:
    model, asked = save_base(tmp_path / "base", family), prompts(4)
    with engine(tmp_path / "base") as llm:
        expected = answers(llm, asked)
    whole = save_compressed(tmp_path / "base", full_rank_adapter(model, config()), tmp_path / "whole")
    windowed = full_rank_adapter(model, config(window=8, group=4, sinks=4))
    windowed = save_compressed(tmp_path / "base", windowed, tmp_path / "windowed")
    for folder, options in ((whole, {}), (windowed, {"max_num_batched_tokens": 48, "enable_chunked_prefill": True})):
        with engine(folder, **options) as llm:
            check_same(answers(llm, asked), expected)


@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (0, 400), (8, 19)])
def test_full_rank_with_sinks_answers_as_vllm_does(window: int, sinks: int, tmp_path: Path) -> None:
    """In pieces of 16 tokens and fewer: 19 sinks are more than the first, 400 more than a request has."""
    model, asked = save_base(tmp_path / "base", "qwen3"), prompts(5, longest=90)
    with engine(tmp_path / "base") as llm:
        expected = answers(llm, asked)
    adapter = full_rank_adapter(model, config(window=window, group=4 if window else 1, sinks=sinks))
    compressed = save_compressed(tmp_path / "base", adapter, tmp_path / "out")
    with engine(compressed, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        check_same(answers(llm, asked), expected)


@pytest.mark.parametrize("settings", [config(0.1), config(0.1, window=8, group=4, k_bits=2, v_bits=2)])
def test_sinks_are_exact_whatever_the_factors(settings: cskv.CSKVConfig, tmp_path: Path) -> None:
    """Where no request is longer, nothing is lost: not by factors of a tenth of the channels, not by two bits."""
    model, asked = save_base(tmp_path / "base"), prompts(4, longest=40)
    with engine(tmp_path / "base") as llm:
        expected = answers(llm, asked)
    compressed = save_compressed(tmp_path / "base", truncated_adapter(model, settings), tmp_path / "out", sinks=64)
    with engine(compressed, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        check_same(answers(llm, asked), expected)
    with engine(save_compressed(tmp_path / "base", truncated_adapter(model, settings), tmp_path / "lossy")) as llm:
        found = answers(llm, asked)
    assert [tokens for tokens, _ in found] != [tokens for tokens, _ in expected]


def test_full_rank_per_head_group_answers_as_vllm_does(tmp_path: Path) -> None:
    model, asked = save_base(tmp_path / "base", num_key_value_heads=4), prompts(3)
    with engine(tmp_path / "base") as llm:
        expected = [tokens for tokens, _ in answers(llm, asked)]
    adapter = grouped_adapter(model, config(head_groups=2))
    with engine(save_compressed(tmp_path / "base", adapter, tmp_path / "out")) as llm:
        assert [tokens for tokens, _ in answers(llm, asked)] == expected


def grouped_adapter(model: nn.Module, settings: cskv.CSKVConfig) -> cskv.CSKVAdapter:
    """Full-rank factors, each head group's in a basis of its own."""
    from cskv.models.sites import find_sites
    from cskv.models.survey import survey

    layers, groups = {}, settings.head_groups
    for site in find_sites(model):
        pair = []
        for projection in (site.k, site.v):
            weight = projection.weight.detach()
            up = torch.cat([torch.eye(site.kv_dim // groups) for _ in range(groups)])
            pair.append(cskv.Factors(weight.clone(), up, None))
        layers[site.layer_idx] = cskv.LayerFactors(*pair)
    return cskv.CSKVAdapter(settings, layers, survey(model).base)


LOSSY = {
    "plain": config(0.5),
    "plain, window": config(0.5, window=8, group=4, sinks=4),
    "plain, sinks": config(0.5, sinks=4),
    "plain, more sinks than a piece has tokens": config(0.5, window=8, group=4, sinks=70),
    "plain, groups without a window": config(0.5, window=0, group=8),
    "int8": config(0.5, k_bits=8, v_bits=8),
    "int4": config(0.5, k_bits=4, v_bits=4, sinks=3),
    "int8, window": config(0.5, window=8, group=8, k_bits=8, v_bits=8),
    "int4, window, keys by channel": config(0.5, window=16, group=16, k_bits=4, v_bits=4, sinks=4),
    "3 and 6 bits, window": config(0.5, window=8, group=8, k_bits=3, v_bits=6),
    "commuting": config(0.5, window=8, group=4),
}


@pytest.fixture(scope="module")
def lossy_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("lossy") / "base"
    return save_base(folder, "qwen3", num_key_value_heads=4), folder


@pytest.mark.parametrize("chunk", [512, 64])
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_answers_are_those_of_the_transformers_path(
    name: str, chunk: int, lossy_base: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, base = lossy_base
    adapter = commuting_adapter(model, sinks=4) if name == "commuting" else truncated_adapter(model, LOSSY[name])
    asked = [prompt for prompt in prompts(3, seed=1) if len(prompt) > 20]
    with cskv.attach(model, adapter):
        expected = [transformers_answer(model, prompt, chunk) for prompt in asked]
    with engine(
        save_compressed(base, adapter, tmp_path / "out"),
        max_num_batched_tokens=chunk,
        enable_prefix_caching=False,
    ) as llm:
        found = [answers(llm, [prompt], TOKENS)[0] for prompt in asked]  # alone, so that chunks are the same
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=2e-3)


@pytest.mark.parametrize("settings", [config(0.5, window=8, group=4), config(0.5, k_bits=8, v_bits=8)])
def test_bf16_is_bf16_of_the_transformers_path(
    settings: cskv.CSKVConfig, lossy_base: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, base = lossy_base
    adapter, (prompt,) = truncated_adapter(model, settings), prompts(1, seed=1)
    shorter = copy.deepcopy(model).to(torch.bfloat16)
    with cskv.attach(shorter, adapter):
        expected = transformers_answer(shorter, prompt, 64)
    with engine(
        save_compressed(base, adapter, tmp_path / "out"),
        dtype="bfloat16",
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    ) as llm:
        ((tokens, logprobs),) = answers(llm, [prompt], TOKENS)
    same = next((i for i, pair in enumerate(zip(tokens, expected[0])) if pair[0] != pair[1]), TOKENS)
    assert same >= 3  # rounding may turn a token in time
    assert logprobs[:same] == pytest.approx(expected[1][:same], abs=0.1)


@pytest.mark.parametrize("chunk", [512, 64])
def test_the_bias_of_commuting_keys_is_read_at_its_positions(chunk: int, tmp_path: Path) -> None:
    model = save_biased_base(tmp_path / "base")
    adapter = commuting_adapter(model, sinks=4)
    assert adapter.factors(0).k.bias is not None
    asked = [prompt for prompt in prompts(3, seed=1) if len(prompt) > 20]
    with cskv.attach(model, adapter):
        expected = [transformers_answer(model, prompt, chunk) for prompt in asked]
    compressed = save_compressed(tmp_path / "base", adapter, tmp_path / "out")
    with engine(compressed, max_num_batched_tokens=chunk, enable_prefix_caching=False) as llm:
        found = [answers(llm, [prompt], TOKENS)[0] for prompt in asked]
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=2e-3)


def test_the_bias_of_commuting_keys_is_read_behind_sinks(tmp_path: Path) -> None:
    model, asked = save_biased_base(tmp_path / "base"), prompts(3, seed=1)
    with engine(tmp_path / "base") as llm:
        expected = answers(llm, asked)
    compressed = save_compressed(tmp_path / "base", commuting_adapter(model, 1.0, sinks=5), tmp_path / "out")
    with engine(compressed, max_num_batched_tokens=48) as llm:
        check_same(answers(llm, asked), expected, 2e-3)


def save_biased_base(folder: Path) -> nn.Module:
    """A model whose keys have biases that are hundreds of times what varies."""
    model = save_base(folder, "qwen2", num_key_value_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.mul_(100)
    model.save_pretrained(folder)
    return model


def commuting_adapter(model: nn.Module, density: float = 0.5, sinks: int = 0) -> cskv.CSKVAdapter:
    from cskv.compression.initialise import initialise
    from tests.attachment.test_closed_form import statistics_of

    sizes = {"k_density": density, "v_density": density, "window": 8, "group": 4, "sinks": sinks}
    settings = cskv.CSKVConfig(**sizes, init="pca", key_factors="commuting")
    return initialise(model, settings, statistics_of(model))


@torch.no_grad()
def transformers_answer(model: nn.Module, prompt: list[int], chunk: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, the prompt read in pieces of `chunk`."""
    from transformers import DynamicCache

    cache, tokens = DynamicCache(config=model.config), torch.tensor([prompt])
    for piece in tokens.split(chunk, dim=1):
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
    found, logprobs = [], []
    for _ in range(TOKENS):
        distribution = torch.log_softmax(logits[0, -1].float(), -1)
        best = int(distribution.argmax())
        found.append(best)
        logprobs.append(float(distribution[best]))
        logits = model(input_ids=torch.tensor([[best]]), past_key_values=cache, use_cache=True).logits
    return found, logprobs

"""Decoding by a graph: the tokens of `generate`. Without a GPU the steps run one operation after another."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import cskv
from cskv import CacheError
from cskv.models.compat import cache_kwarg
from cskv.quantization.dispatch import quantise
from tests.attachment.test_static_cache import GROUP, PADDED, PROMPT, ROOT, SETTINGS, attached
from tests.models.families import tiny_model

NEW = 3 * GROUP + 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prefilled(model: nn.Module, mask: Tensor, length: int = 64) -> tuple[StaticCache, Tensor]:
    """A cache that holds the prompt, and the first token of the answer."""
    cache, mask = StaticCache(config=model.config, max_cache_len=length), mask.to(DEVICE)
    prompt = PROMPT.to(DEVICE).masked_fill(mask == 0, 0)
    with torch.no_grad():
        position = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = model(prompt, attention_mask=mask, position_ids=position, **{cache_kwarg(model): cache})
    return cache, outputs.logits[:, -1].argmax(-1, keepdim=True)


def by_graph(model: nn.Module, mask: Tensor, **kwargs: Any) -> Tensor:
    cache, token = prefilled(model, mask)
    graph = cskv.DecodeGraph(model, cache, **kwargs)
    answer = [token]
    graph.step(token)
    for _ in range(NEW - 2):
        answer.append(graph.tokens.clone())
        graph.step()
    return torch.cat([*answer, graph.tokens], dim=1).cpu()


def by_generate(model: nn.Module, mask: Tensor) -> Tensor:
    prompt = PROMPT.masked_fill(mask == 0, 0)
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(prompt.to(DEVICE), attention_mask=mask.to(DEVICE), **how)[:, PROMPT.shape[1] :].cpu()


@pytest.mark.parametrize("name", list(SETTINGS))
def test_it_writes_what_generate_does(name: str) -> None:
    everything = torch.ones_like(PROMPT)
    with attached("llama", name) as model:
        model.to(DEVICE)
        assert torch.equal(by_graph(model, everything), by_generate(model, everything))
        assert torch.equal(by_graph(model, PADDED, attention_mask=PADDED), by_generate(model, PADDED))


def test_it_decodes_without_a_compressor_too() -> None:
    model = tiny_model("qwen2").to(DEVICE)
    assert torch.equal(by_graph(model, PADDED, attention_mask=PADDED), by_generate(model, PADDED))


def test_the_logits_are_those_of_the_tokens_that_were_given() -> None:
    tokens = torch.randint(3, 96, (20, 3, 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with attached("qwen3", "packed") as model, torch.no_grad():
        model.to(DEVICE)
        dynamic, everything = DynamicCache(config=model.config), torch.ones_like(PROMPT)
        model(PROMPT.to(DEVICE), **{cache_kwarg(model): dynamic})
        graph = cskv.DecodeGraph(model, prefilled(model, everything)[0])
        for token in tokens:
            expected = model(token, **{cache_kwarg(model): dynamic}).logits[:, -1]
            torch.testing.assert_close(graph.step(token), expected, rtol=1e-4, atol=1e-4)
        assert graph.length == PROMPT.shape[1] + len(tokens)


def test_blocks_are_packed_once_and_the_cache_goes_on_without_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []

    def noted(latents: Tensor, grid: Any) -> Any:
        packed.append(latents.shape[1])
        return quantise(latents, grid)

    monkeypatch.setattr("cskv.cache.static.quantise", noted)
    everything = torch.ones_like(PROMPT)
    with attached("llama", "packed") as model, torch.no_grad():
        cache, token = prefilled(model.cpu(), everything)
        dynamic = DynamicCache(config=model.config)
        model(PROMPT, **{cache_kwarg(model): dynamic})
        graph = cskv.DecodeGraph(model, cache)
        packed.clear()
        for _ in range(2 * GROUP):
            graph.step(token)
            model(token, **{cache_kwarg(model): dynamic})
        assert packed.count(GROUP) == 2 * 2  # of keys, which are packed in groups, of two layers
        assert packed.count(1) == 2 * GROUP * 2  # of values, which are packed one by one
        for _ in range(2 * GROUP):
            ours, theirs = (model(token, **{cache_kwarg(model): each}).logits for each in (cache, dynamic))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_no_graph_can_be_made_of_is_refused() -> None:
    everything = torch.ones_like(PROMPT)
    with attached("llama", "joint") as model:
        model.to(DEVICE)
        with pytest.raises(CacheError, match="the cache is empty"):
            cskv.DecodeGraph(model, StaticCache(config=model.config, max_cache_len=20))
        with pytest.raises(CacheError, match="steps on CSKVLayer layers"):
            dynamic = DynamicCache(config=model.config)
            with torch.no_grad():
                model(PROMPT.to(DEVICE), **{cache_kwarg(model): dynamic})
            cskv.DecodeGraph(model, dynamic)
        cache, token = prefilled(model, everything, 15)
        with pytest.raises(CacheError, match=r"is of shape \(3, 13\); expected \(batch, 14\)"):
            cskv.DecodeGraph(model, cache, attention_mask=everything[:, 1:])
        with pytest.raises(CacheError, match="pad on the left only"):
            cskv.DecodeGraph(model, cache, attention_mask=PADDED.flip(1))
        graph = cskv.DecodeGraph(model, cache)
        with pytest.raises(CacheError, match="no step has been run yet"):
            graph.step()
        graph.step(token)
        with pytest.raises(CacheError, match="holds 15 tokens, and is full"):
            graph.step()
    model = tiny_model("gemma2").to(DEVICE)
    with pytest.raises(CacheError, match="steps on StaticSlidingWindowLayer layers"):
        cskv.DecodeGraph(model, prefilled(model, everything)[0])


def test_the_documents_python_runs() -> None:
    text = (ROOT / "docs" / "compress-your-model.md").read_text(encoding="utf-8")
    section = text.split("## A decode step as one graph")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    code = "\n".join(blocks).replace("past_key_values", cache_kwarg(tiny_model("llama")))
    with attached("llama", "packed") as model:
        model.to(DEVICE)
        names = {"cskv": cskv, "model": model, "inputs": {"input_ids": PROMPT.to(DEVICE)}}
        exec(compile(code, "compress-your-model.md", "exec"), names)
    assert names["graph"].length == PROMPT.shape[1] + 21


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_replayed_graph_computes_what_steps_do(name: str) -> None:
    """Graphs are captured at the first step, and at the first that packs."""
    tokens = torch.randint(3, 96, (NEW, 3, 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with attached("llama", name) as model, torch.no_grad():
        model.to(DEVICE)
        everything = torch.ones_like(PROMPT)
        by_steps, graph = prefilled(model, everything)[0], cskv.DecodeGraph(model, prefilled(model, everything)[0])
        for token in tokens:
            expected = model(token, **{cache_kwarg(model): by_steps}).logits[:, -1]
            torch.testing.assert_close(graph.step(token), expected, rtol=1e-3, atol=1e-3)

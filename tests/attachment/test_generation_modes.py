"""At full rank the compressed cache changes no token, in any family and any way of generating."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

import cskv
from cskv.attachment.layer import CSKVLayer
from cskv.models.compat import cache_kwarg, output_cache
from tests.models.families import FAMILIES, UNUSUAL, full_rank_adapter, tiny_model

NEW_TOKENS = 14
PROMPT = torch.tensor([[5, 9, 33, 71, 12, 8, 5, 9, 33, 40, 77, 3, 18, 5, 9, 33, 71, 60, 21, 7, 5, 9, 33]])


def generate(model: nn.Module, tokens: Tensor, **settings: Any) -> Tensor:
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, **settings)
    settings = {} if "attention_mask" in settings else {"attention_mask": torch.ones_like(tokens)}
    return model.generate(tokens, generation_config=config, **settings)


def greedy(model: nn.Module) -> Tensor:
    return generate(model, PROMPT, do_sample=False)


def sampling(model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    return generate(model, PROMPT, do_sample=True, temperature=1.3)


def beams(model: nn.Module) -> Tensor:
    return generate(model, PROMPT, do_sample=False, num_beams=3)


def several_returned(model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    return generate(model, PROMPT, do_sample=True, num_return_sequences=2)


def left_padded(model: nn.Module) -> Tensor:
    short = torch.cat([torch.zeros(1, 9, dtype=torch.long), PROMPT[:, :-9]], dim=1)
    tokens = torch.cat([PROMPT, short])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, do_sample=False)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    return model.generate(tokens, attention_mask=mask, generation_config=config)


def prompt_lookup(model: nn.Module) -> Tensor:
    return generate(model, PROMPT, do_sample=False, prompt_lookup_num_tokens=4)


def chunked_prefill(model: nn.Module) -> Tensor:
    return generate(model, PROMPT, do_sample=False, prefill_chunk_size=6)


def multi_turn(model: nn.Module) -> Tensor:
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
    )
    first = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), generation_config=config)
    follow_up = torch.cat([first.sequences, PROMPT[:, 4:11]], dim=1)
    cache = {cache_kwarg(model): output_cache(first)}
    second = model.generate(follow_up, attention_mask=torch.ones_like(follow_up), generation_config=config, **cache)
    return second.sequences


MODES: list[Callable[[nn.Module], Tensor]] = [
    greedy,
    sampling,
    beams,
    several_returned,
    left_padded,
    prompt_lookup,
    chunked_prefill,
    multi_turn,
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_full_rank_changes_no_token(name: str, mode: Callable[[nn.Module], Tensor]) -> None:
    # A model each: with dynamic RoPE scaling, a model remembers how long its last sequence was.
    expected = mode(tiny_model(name))
    model = tiny_model(name)
    with cskv.attach(model, full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=3, group=4))):
        assert torch.equal(mode(model), expected)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("attention", ["rebuild", "reference"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_nor_does_it_with_another_attention(name: str, attention: str, mode: Callable[[nn.Module], Tensor]) -> None:
    expected = mode(tiny_model(name))
    model = tiny_model(name)
    adapter = full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=3, group=4))
    with cskv.attach(model, adapter, attention=attention):
        assert torch.equal(mode(model), expected)


@pytest.mark.skipif(not UNUSUAL, reason="this release of transformers has no Gemma4")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_a_layer_whose_keys_others_read_too_is_rebuilt_and_says_so(mode: Callable[[nn.Module], Tensor]) -> None:
    expected = mode(tiny_model("gemma4-shared"))
    model = tiny_model("gemma4-shared")
    adapter = full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=3, group=4))
    with pytest.warns(UserWarning, match="model.layers.5.self_attn, another layer reads its keys and values too"):
        attachment = cskv.attach(model, adapter)
    with attachment:
        assert torch.equal(mode(model), expected)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_full_rank_logits_agree_at_every_step(name: str) -> None:
    model = tiny_model(name)
    tokens = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = _teacher_forced(tiny_model(name), tokens)
        with cskv.attach(model, full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=0, group=1))):
            got = _teacher_forced(model, tokens)
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()


def _teacher_forced(model: nn.Module, tokens: Tensor, prefill: int = 20) -> Tensor:
    cache = {cache_kwarg(model): DynamicCache(config=model.config)}
    rows = [model(tokens[:, :prefill], **cache).logits[:, -1]]
    rows += [model(tokens[:, t : t + 1], **cache).logits[:, -1] for t in range(prefill, tokens.shape[1])]
    return torch.stack(rows)


@pytest.mark.parametrize("cache", [DynamicCache, None], ids=["lazy", "default"])
def test_a_users_own_cache_is_compressed(cache: type[DynamicCache] | None) -> None:
    model = tiny_model("llama")
    expected = model(PROMPT).logits
    with cskv.attach(model, full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0))), torch.no_grad():
        given = {} if cache is None else {cache_kwarg(model): cache()}
        outputs = model(PROMPT, use_cache=True, **given)
    assert all(isinstance(layer, CSKVLayer) for layer in output_cache(outputs).layers)
    assert torch.equal(outputs.logits, expected)


def test_a_copied_cache_continues_on_its_own() -> None:
    model = tiny_model("qwen3")
    with cskv.attach(model, full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=0, group=4))), torch.no_grad():
        prefix = output_cache(model(PROMPT, use_cache=True))
        tails = [torch.tensor([[11, 12, 13]]), torch.tensor([[50, 51, 52]])]
        for tail in tails:
            continued = model(tail, **{cache_kwarg(model): copy.deepcopy(prefix)}).logits
            expected = model(torch.cat([PROMPT, tail], dim=1)).logits[:, -3:]
            assert torch.allclose(continued, expected, atol=1e-3)
        assert prefix.get_seq_length() == PROMPT.shape[1]


def test_pipeline_uses_the_compressed_cache() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(96)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")
    model = tiny_model("llama")
    settings = GenerationConfig(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    prompt = " ".join(f"w{i}" for i in PROMPT[0].tolist())
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = generator(prompt, generation_config=settings)
    with cskv.attach(model, full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=0, group=4))):
        assert generator(prompt, generation_config=settings) == expected


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma4"])
@pytest.mark.parametrize("new", [1, 64, 65, 90])
def test_pieces_of_any_length_read_the_past(name: str, new: int) -> None:
    """Up to 64 tokens attend to latents; for more, old keys and values are rebuilt."""
    tokens = torch.randint(3, 96, (2, 60 + new), generator=torch.Generator().manual_seed(4))
    model = tiny_model(name)
    with torch.no_grad():
        expected = model(tokens).logits[:, 60:]
        with cskv.attach(model, full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=3, group=4))):
            cache = {cache_kwarg(model): DynamicCache(config=model.config)}
            model(tokens[:, :60], **cache)
            got = model(tokens[:, 60:], **cache).logits
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()

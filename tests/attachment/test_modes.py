"""An attached model under the modes of torch, in threads, copied, thrown away: as the bare model, or one clear line."""

from __future__ import annotations

import copy
import gc
import sys
import tracemalloc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cskv
from cskv import CacheError, CSKVConfig, CSKVError
from cskv.attachment.attach import attachment_of
from cskv.attachment.cache_bytes import adapter_report
from cskv.compression.initialise import initialise
from cskv.models.compat import cache_kwarg, output_cache
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import full_rank_adapter, tiny_model, truncated_adapter

EXACT = CSKVConfig(1.0, 1.0, window=8, group=8)
PROMPT = torch.randint(5, 96, (1, 60), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decode(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """Logits of the tokens after a prompt, one by one."""
    outputs, found = model(tokens[:, :prompt], use_cache=True), []
    for i in range(prompt, tokens.shape[1]):
        outputs = model(tokens[:, i : i + 1], **{cache_kwarg(model): output_cache(outputs)}, use_cache=True)
        found.append(outputs.logits[0, -1])
    return torch.stack(found)


def generate(model: nn.Module, **kwargs: Any) -> list[int]:
    mask = torch.ones_like(PROMPT)
    outputs = model.generate(PROMPT, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, **kwargs)
    return outputs[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("key_factors", ["joint", "commuting"])
def test_threads_on_one_model_do_not_disturb_each_other(key_factors: str) -> None:
    model = tiny_model("llama-mha", max_position_embeddings=1024)
    settings = CSKVConfig(1.0, 1.0, window=0, group=8, init="pca", key_factors=key_factors)
    texts = [torch.randint(5, 96, (1, n), generator=torch.Generator().manual_seed(n)) for n in (500, 300)]
    interval = sys.getswitchinterval()
    with cskv.attach(model, initialise(model, settings, statistics_of(model))):
        alone = [decode(model, text, text.shape[1] - 6) for text in texts]
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(2) as pool:
                for _ in range(4):
                    together = pool.map(lambda text: decode(model, text, text.shape[1] - 6), texts)
                    assert all(torch.equal(own, expected) for own, expected in zip(together, alone))
        finally:
            sys.setswitchinterval(interval)


def test_a_cache_is_not_read_by_other_factors_of_the_same_ranks() -> None:
    model = tiny_model("llama")
    first, second = truncated_adapter(model, CSKVConfig(0.5, 0.5)), truncated_adapter(model, CSKVConfig(0.5, 0.5))
    with torch.no_grad():
        second.factors(0).k.down.neg_()
    with cskv.attach(model, first), torch.no_grad():
        cache = output_cache(model(PROMPT, use_cache=True))
        model(PROMPT[:, :1], **{cache_kwarg(model): cache})
    with cskv.attach(model, second), torch.no_grad(), pytest.raises(CacheError, match="another compressor"):
        model(PROMPT[:, :1], **{cache_kwarg(model): cache})
    with cskv.attach(model, copy.deepcopy(first)), torch.no_grad():
        model(PROMPT[:, :1], **{cache_kwarg(model): cache})


@pytest.mark.parametrize("guesses", ["lookup", "assistant"])
def test_no_guess_however_long_takes_the_window(guesses: str) -> None:
    """A sequence that is shorter than the window is exact, so the text is the bare model's at any rank."""
    model = tiny_model("llama", max_position_embeddings=512)
    text = PROMPT[:, :12].repeat(1, 5)
    assistant = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=512)
    assistant.generation_config.num_assistant_tokens = 20
    assistant.generation_config.assistant_confidence_threshold = 0.0
    given = {"prompt_lookup_num_tokens": 20} if guesses == "lookup" else {"assistant_model": assistant}
    asked = {"attention_mask": torch.ones_like(text), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(text, **asked)
    with cskv.attach(model, truncated_adapter(model, CSKVConfig(0.25, 0.25, window=64, group=1))):
        outputs = model.generate(text, **asked, **given, return_dict_in_generate=True)
    assert torch.equal(outputs.sequences, expected)
    assert output_cache(outputs).layers[0].store.sealed == 0


def test_a_copy_of_an_attached_model_is_attached_by_itself() -> None:
    model = tiny_model("llama")
    bare = decode(model, PROMPT, 40)
    attachment = cskv.attach(model, truncated_adapter(model, CSKVConfig(0.25, 0.25, window=0, group=4)))
    lossy, twin = decode(model, PROMPT, 40), copy.deepcopy(model)
    attachment.detach()
    assert torch.equal(decode(model, PROMPT, 40), bare)
    assert torch.equal(decode(twin, PROMPT, 40), lossy)
    cskv.detach(twin)
    assert torch.equal(decode(twin, PROMPT, 40), bare)
    assert twin.config._attn_implementation == "sdpa"
    cskv.attach(twin, attachment.adapter).detach()


def test_a_part_of_an_attached_model_is_attached() -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig())
    attachment = cskv.attach(model, adapter)
    assert attachment_of(model.model) is attachment
    for action in (
        lambda: cskv.attach(model.model, adapter),
        lambda: cskv.calibrate(model, [PROMPT]),
        lambda: cskv.initialise(model, CSKVConfig(init="svd")),
    ):
        with pytest.raises(CSKVError, match=r"attached.*call cskv\.detach\(model\) first"):
            action()
    cskv.detach(model.model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_attached_model_is_freed_with_its_last_reference() -> None:
    model = tiny_model("llama")
    cskv.attach(model, truncated_adapter(model, CSKVConfig()))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_an_attach_that_fails_leaves_no_hook() -> None:
    model = tiny_model("llama")
    AttentionInterface.register("not_understood", ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("not_understood", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "not_understood"  # of which attach warns
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="are rebuilt at every step"):
        warnings.simplefilter("error")
        cskv.attach(model, truncated_adapter(model, CSKVConfig()))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == "not_understood"


@pytest.mark.parametrize("attention", ["auto", "rebuild"])
def test_gradients_flow_through_what_follows_a_cache(attention: str) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        with torch.no_grad():
            cache = output_cache(model(PROMPT[:, :40], use_cache=True))
        model(PROMPT[:, 40:], **{cache_kwarg(model): cache}).logits.square().mean().backward()
        own = model.model.layers[0].self_attn
        return [own.q_proj.weight.grad.clone(), own.v_proj.weight.grad.clone(), model.model.norm.weight.grad.clone()]

    model = tiny_model("llama")
    expected = gradients(model)
    with cskv.attach(model, full_rank_adapter(model, EXACT), attention=attention):
        for own, bare in zip(gradients(model), expected):
            torch.testing.assert_close(own, bare, rtol=1e-3, atol=1e-6)


def test_gradients_through_sealed_tokens_are_refused() -> None:
    model = tiny_model("llama")
    with cskv.attach(model, full_rank_adapter(model, EXACT)):
        outputs = model(PROMPT, use_cache=True)
        outputs.logits.mean().backward()  # a prefill is exact
        with pytest.raises(CacheError, match=r"gradients cannot flow.*torch\.no_grad"):
            model(PROMPT[:, :1], **{cache_kwarg(model): output_cache(outputs)})


@pytest.mark.parametrize("bits", [4, 16])
def test_inference_mode_may_come_and_go(bits: int) -> None:
    model = tiny_model("llama")
    settings = CSKVConfig(1.0, 1.0, window=8, group=8, k_bits=bits, v_bits=bits)
    with cskv.attach(model, full_rank_adapter(model, settings)):
        with torch.inference_mode():
            inside = generate(model)
            cache = output_cache(model(PROMPT, use_cache=True))
            cache.reorder_cache(torch.tensor([0]))
        assert generate(model) == inside
        with torch.no_grad():
            for _ in range(20):
                model(PROMPT[:, :1], **{cache_kwarg(model): cache})
        assert cache.layers[0].store.sealed == 64  # of 80: 4 are sinks, 8 in the window, 4 fill no group


@pytest.mark.parametrize("attention", ["auto", "reference", "rebuild"])
def test_autocast_gives_the_bare_models_tokens(attention: str) -> None:
    model = tiny_model("qwen3")  # with norms that leave keys in fp32 there
    adapter = full_rank_adapter(model, EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model)
        with cskv.attach(model, adapter, attention=attention):
            assert generate(model) == expected


def test_packed_tokens_hold_no_python_objects() -> None:
    model = tiny_model("llama", max_position_embeddings=8192)
    adapter = truncated_adapter(model, CSKVConfig(1.0, 1.0, window=32, group=32, k_bits=4, v_bits=4))
    with cskv.attach(model, adapter), torch.no_grad():
        cache = output_cache(model.model(torch.randint(5, 96, (1, 1024)), use_cache=True))
        tracemalloc.start()
        for _ in range(3):
            model.model(torch.randint(5, 96, (1, 1024)), **{cache_kwarg(model): cache})
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held / 3072 < 20  # bytes of a token: an int of a token and layer would take 40


def test_bytes_of_a_cache_that_fits_nowhere_are_told_at_once() -> None:
    model = tiny_model("llama")
    report = adapter_report(truncated_adapter(model, CSKVConfig(0.5, 0.5, k_bits=4, v_bits=4)), 10**20)
    assert report.total_bytes > 10**20
    assert report.ratio < 0.2


@pytest.mark.parametrize("bits", [4, 16])
def test_the_bias_of_keys_costs_commuting_ones_nothing(bits: int) -> None:
    """In few bits it would drown all else. It is read at its own position, in every way of reading."""
    model = tiny_model("qwen2", num_key_value_heads=4)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[[1, 5, 17, 30]] = torch.tensor([600.0, -600.0, 600.0, -600.0])
    settings = CSKVConfig(1.0, 1.0, window=0, group=8, init="pca", key_factors="commuting", k_bits=bits, v_bits=16)
    expected = decode(model, PROMPT, 40).log_softmax(-1)
    adapter = initialise(model, settings, statistics_of(model))
    for attention in ("auto", "reference", "rebuild"):
        with cskv.attach(model, adapter, attention=attention):
            found = decode(model, PROMPT, 40).log_softmax(-1)
        kl = float((expected.exp() * (expected - found)).sum(-1).mean())
        assert kl < (0.15 if bits == 4 else 1e-5), (attention, kl)  # 0.85 nats at 4 bits where they hold the bias

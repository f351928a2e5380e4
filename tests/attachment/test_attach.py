"""Attaching: what is refused, and that detaching leaves no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cskv
from cskv import CacheError, CSKVConfig, CSKVError, UnsupportedModelError
from cskv.models.compat import cache_kwarg, output_cache
from tests.models.families import SHAPE, full_rank_adapter, tiny_model, truncated_adapter

PROMPT = torch.arange(5, 45)[None]


def test_detaching_restores_the_model_bitwise() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(PROMPT).logits
    attachment = cskv.attach(model, truncated_adapter(model, CSKVConfig()))
    model.generate(PROMPT, max_new_tokens=4, pad_token_id=0)
    assert list(model.state_dict()) == list(before)
    attachment.detach()
    attachment.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(PROMPT).logits, logits)


def test_attaching_twice_is_refused_and_once_more_after_detaching_is_not() -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig())
    cskv.attach(model, adapter)
    with pytest.raises(CSKVError, match="attached already"):
        cskv.attach(model, adapter)
    cskv.detach(model)
    with pytest.raises(CSKVError, match="no compressor attached"):
        cskv.detach(model)
    with cskv.attach(model, adapter):
        pass


def test_leaving_the_block_by_an_error_detaches() -> None:
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), cskv.attach(model, truncated_adapter(model, CSKVConfig())):
        raise ZeroDivisionError
    with pytest.raises(CSKVError, match="no compressor"):
        cskv.detach(model)


def test_a_lossy_cache_does_change_the_answer() -> None:
    """Guards the exactness tests: the compressed branch really is read."""
    model = tiny_model("llama")
    config = CSKVConfig(0.1, 0.1, window=0, group=4)
    with torch.no_grad():
        cache = output_cache(model(PROMPT, use_cache=True))
        exact = model(PROMPT[:, :1], **{cache_kwarg(model): cache}).logits
        with cskv.attach(model, truncated_adapter(model, config)):
            outputs = model(PROMPT, use_cache=True)
            assert torch.equal(outputs.logits, model(PROMPT, use_cache=False).logits)  # a prefill attends exactly
            lossy = model(PROMPT[:, :1], **{cache_kwarg(model): output_cache(outputs)}).logits
    assert (lossy - exact).abs().max() > 0.05


@pytest.mark.parametrize("implementation", ["offloaded_static", "offloaded"])
def test_a_cache_that_cannot_hold_latents_is_refused(implementation: str) -> None:
    model = tiny_model("llama")
    config = GenerationConfig(max_new_tokens=3, cache_implementation=implementation, pad_token_id=0)
    with cskv.attach(model, truncated_adapter(model, CSKVConfig())), pytest.raises(CacheError, match="dynamic cache"):
        model.generate(PROMPT, generation_config=config)


def test_continuous_batching_is_refused() -> None:
    model = tiny_model("llama")
    with cskv.attach(model, truncated_adapter(model, CSKVConfig())):
        model.config._attn_implementation = "paged|sdpa"
        with pytest.raises(CacheError, match="continuous batching"):
            model.model.layers[0].self_attn(
                hidden_states=torch.zeros(1, 3, 64),
                position_embeddings=(torch.ones(1, 3, 16), torch.zeros(1, 3, 16)),
                attention_mask=None,
            )


def test_a_cache_filled_before_attaching_is_refused() -> None:
    model = tiny_model("llama")
    cache = output_cache(model(PROMPT, use_cache=True))
    with (
        cskv.attach(model, truncated_adapter(model, CSKVConfig())),
        pytest.raises(CacheError, match="40 tokens that were"),
    ):
        model(PROMPT[:, :1], **{cache_kwarg(model): cache})


def test_a_compressed_cache_is_refused_by_the_bare_model_and_by_another_compressor() -> None:
    model = tiny_model("llama")
    with cskv.attach(model, truncated_adapter(model, CSKVConfig(0.25, 0.25))), torch.no_grad():
        cache = output_cache(model(PROMPT, use_cache=True))
    with pytest.raises(CacheError, match="without its compressor"):
        model(PROMPT[:, :1], **{cache_kwarg(model): cache})
    other = truncated_adapter(model, CSKVConfig(0.5, 0.25))
    with cskv.attach(model, other), torch.no_grad(), pytest.raises(CacheError, match="another compressor"):
        model(PROMPT[:, :1], **{cache_kwarg(model): cache})


def test_encoder_decoders_are_refused() -> None:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        cskv.models.sites.find_sites(model)


def test_a_model_without_known_projections_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match=r"no attention module with k_proj/v_proj"):
        cskv.models.sites.find_sites(model)


def test_a_model_that_only_slides_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        cskv.models.sites.find_sites(tiny_model("mistral", sliding_window=8))


def test_keys_that_follow_no_known_recipe_are_refused() -> None:
    """A family that scales its keys after the rotation, say: the probe must see it."""

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    adapter = full_rank_adapter(model, CSKVConfig(1.0, 1.0))
    original = DynamicCache.update

    def scaling_update(self, keys, values, *args, **kwargs):
        return original(self, keys * 1.01, values, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicCache, "update", scaling_update)
        with pytest.raises(
            UnsupportedModelError, match=r"keys of model.layers.0.self_attn.*no known norm and rotation"
        ):
            cskv.attach(model, adapter)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_full_attention_layers_are_compressed() -> None:
    model = tiny_model("gemma2")
    adapter = truncated_adapter(model, CSKVConfig())
    assert adapter.layer_indices == [1, 3]
    with cskv.attach(model, adapter), torch.no_grad():
        cache = output_cache(model(PROMPT, use_cache=True))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "CSKVLayer"] * 2


def test_bf16_models_attach_and_generate() -> None:
    model = tiny_model("qwen3").to(torch.bfloat16)
    adapter = truncated_adapter(tiny_model("qwen3"), CSKVConfig(0.5, 0.5, window=0, group=4))
    with cskv.attach(model, adapter), torch.no_grad():
        outputs = model.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=8,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    layer = output_cache(outputs).layers[0]
    assert layer.store._k.view(4).read().dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 16])
def test_the_capacity_of_a_cache_is_preallocated_once(bits: int) -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig(0.5, 0.5, window=0, group=4, k_bits=bits, v_bits=bits))
    settings = {"max_new_tokens": 60, "min_new_tokens": 60, "pad_token_id": 0, "return_dict_in_generate": True}
    with cskv.attach(model, adapter), torch.no_grad():
        expected = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)
    with cskv.attach(model, adapter, max_cache_len=120), torch.no_grad():
        outputs = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)
    assert torch.equal(outputs.sequences, expected.sequences)
    layer = output_cache(outputs).layers[0]
    buffer = layer.store._k._tokens if bits == 16 else layer.store._k._payload
    assert buffer._storage.shape[1] == 120
    assert layer.table._buffers[0]._storage.shape[1] == 120


def test_what_is_asked_of_attention_and_capacity_is_checked() -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig())
    with pytest.raises(
        cskv.ConfigError, match="attention is 'flash'; expected one of auto, triton, cpu, torch, reference, rebuild"
    ):
        cskv.attach(model, adapter, attention="flash")
    with pytest.raises(cskv.ConfigError, match="max_cache_len is 0"):
        cskv.attach(model, adapter, max_cache_len=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_attention_is_rebuilt_for_and_said() -> None:
    model = tiny_model("llama")
    expected = model.generate(PROMPT, max_new_tokens=8, pad_token_id=0, attention_mask=torch.ones_like(PROMPT))
    AttentionInterface.register("someones_own", ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("someones_own", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "someones_own"
    with pytest.warns(UserWarning, match="2 of 2 layers are rebuilt.*'someones_own', none of eager, sdpa, flash"):
        attachment = cskv.attach(model, full_rank_adapter(model, CSKVConfig(1.0, 1.0, window=0, group=4)))
    with attachment:
        got = model.generate(PROMPT, max_new_tokens=8, pad_token_id=0, attention_mask=torch.ones_like(PROMPT))
    assert torch.equal(got, expected)


def test_a_model_that_is_switched_to_other_attention_meanwhile_keeps_its_answer_and_its_choice() -> None:
    model = tiny_model("llama")
    expected = model.generate(PROMPT, max_new_tokens=8, pad_token_id=0, attention_mask=torch.ones_like(PROMPT))
    with cskv.attach(model, full_rank_adapter(model, CSKVConfig(1.0, 1.0, window=0, group=4))):
        model.set_attn_implementation("eager")
        got = model.generate(PROMPT, max_new_tokens=8, pad_token_id=0, attention_mask=torch.ones_like(PROMPT))
    assert torch.equal(got, expected)
    assert model.config._attn_implementation == "eager"


def test_attention_that_another_library_has_wrapped_goes_on_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """kvpress wraps every registered attention function when it is imported, and passes dropout by position."""
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig(window=4, group=8))
    with cskv.attach(model, adapter):
        expected = model.generate(PROMPT, max_new_tokens=4, pad_token_id=0)
        name = model.config._attn_implementation
        ours = ALL_ATTENTION_FUNCTIONS[name]

        def wrapped(module, query, key, value, attention_mask, dropout, **kwargs):
            return ours(module, query, key, value, attention_mask, dropout, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, wrapped)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=4, pad_token_id=0), expected)

"""Reading a whole text as compressed, in one forward: the same numbers as decoding it token by token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

import cskv
from cskv import CSKVConfig, LayerFactors
from cskv.models.compat import cache_kwarg
from cskv.models.survey import survey
from cskv.reading.compressed import compressed_reading
from cskv.reading.divergence import Divergence
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import FAMILIES, tiny_model, truncated_adapter
from tests.models.flash import KERNELS, flash_attention, standing_in, uncompiled_flex_attention

FLASH, FLEX = "flash_attention_2", "flex_attention"
TOKENS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(8))


def decoded(model: nn.Module, adapter: cskv.CSKVAdapter) -> Tensor:
    """Logits of token-by-token decoding from the first token on."""
    cache = {cache_kwarg(model): DynamicCache(config=model.config)}
    with cskv.attach(model, adapter), torch.no_grad():
        return torch.cat([model(TOKENS[:, t : t + 1], **cache).logits for t in range(TOKENS.shape[1])], dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if "dynamic" not in name])
def test_it_reads_what_decoding_reads(family: str, attention: str) -> None:
    model = tiny_model(family)
    if family not in ("gemma2", "gpt-oss"):  # soft-capping and sinks exist in eager attention only
        model.set_attn_implementation(attention)
    adapter = truncated_adapter(model, CSKVConfig(0.5, 0.25, window=3, group=4))
    expected = decoded(model, adapter)
    before = model.config._attn_implementation
    with compressed_reading(survey(model), adapter), torch.no_grad():
        got = model(TOKENS, use_cache=False).logits
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_commuting_keys_are_read_likewise() -> None:
    from cskv.compression.initialise import initialise

    model = tiny_model("qwen3")
    config = CSKVConfig(0.5, 0.5, window=0, group=4, init="pca", key_factors="commuting")
    adapter = initialise(model, config, statistics_of(model))
    expected = decoded(model, adapter)
    with compressed_reading(survey(model), adapter), torch.no_grad():
        got = model(TOKENS, use_cache=False).logits
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("bias", [0.0, 600.0])
def test_a_bias_of_keys_is_left_out_of_commuting_latents(bias: float) -> None:
    """As in Qwen2, whose biases are hundreds: in 4 bits they would take the whole grid."""
    from cskv.compression.initialise import initialise

    model = tiny_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[[1, 5, 17, 30]] = torch.tensor([bias, -bias, bias, -bias])
    statistics, divergence = statistics_of(model), Divergence(survey(model))
    kl = {}
    for factors, bits in product(("joint", "commuting"), (16, 4)):
        config = CSKVConfig(1.0, 1.0, window=0, group=8, key_factors=factors, k_bits=bits)
        kl[factors, bits] = divergence.kl(initialise(model, config, statistics), TOKENS).item()
    assert max(kl["joint", 16], kl["commuting", 16]) < 1e-3
    assert kl["commuting", 4] < 3 * kl["joint", 4]


def test_commuting_factors_without_a_bias_are_read_as_before(tmp_path: Path) -> None:
    """Those of models without one, and of older adapters of models with one."""
    from cskv.compression.initialise import initialise

    config = CSKVConfig(1.0, 1.0, window=0, group=4, key_factors="commuting")
    for family, biased in (("llama", False), ("qwen2", True)):
        model = tiny_model(family)
        adapter = initialise(model, config, statistics_of(model))
        layers = {i: adapter.factors(i) for i in adapter.layer_indices}
        assert all((own.k.bias is not None) == biased for own in layers.values())
        older = {i: LayerFactors(replace(own.k, bias=None).clone(), own.v.clone()) for i, own in layers.items()}
        cskv.CSKVAdapter(config, older, adapter.base).save_pretrained(tmp_path / family)
        loaded = cskv.CSKVAdapter.from_pretrained(tmp_path / family)
        assert loaded.factors(0).k.bias is None
        assert abs(Divergence(survey(model)).kl(loaded, TOKENS).item()) < 1e-3  # at full rank they lose nothing


def test_gradients_reach_every_factor() -> None:
    model = tiny_model("llama").requires_grad_(False)
    adapter = truncated_adapter(model, CSKVConfig(0.25, 0.25, window=0, group=4))
    with compressed_reading(survey(model), adapter):
        model(TOKENS, use_cache=False).logits.square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_checkpointed_layers_give_the_same_gradients(family: str) -> None:
    model = tiny_model(family).requires_grad_(False).train()  # dropout must not come in with the second forward either
    adapter = truncated_adapter(model, CSKVConfig(0.25, 0.25, window=0, group=4))
    divergence = Divergence(survey(model))
    gradients = []
    for checkpointed in (False, True):
        adapter.zero_grad()
        divergence.kl(adapter, TOKENS, checkpointed=checkpointed).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in adapter.named_parameters()})
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert model.training
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def test_checkpointing_keeps_only_the_layers_inputs() -> None:
    model = tiny_model("llama").requires_grad_(False)
    adapter = truncated_adapter(model, CSKVConfig(0.25, 0.25, window=0, group=4))
    divergence = Divergence(survey(model))
    held = []
    for checkpointed in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            divergence.kl(adapter, TOKENS, checkpointed=checkpointed)
        held.append(sum(sizes))
    assert held[1] < 0.4 * held[0]


def test_a_cache_is_refused() -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig())
    with compressed_reading(survey(model), adapter), pytest.raises(cskv.CSKVError, match="without a cache"):
        model(TOKENS, use_cache=True)
    model(TOKENS, use_cache=True)


def test_attention_that_reads_no_mask_of_queries_and_keys_is_refused() -> None:
    """Flash attention reads (batch, tokens): it would take a mask of logits for one of padding."""
    masks: list[object] = []

    def like_flash(module: nn.Module, *states: Tensor, **kwargs: object) -> tuple:
        masks.append(states[3])
        return sdpa_attention_forward(module, *states[:3], None, **{**kwargs, "is_causal": True})

    AttentionInterface.register("like_fa", like_flash)
    AttentionMaskInterface.register("like_fa", flash_attention_mask)
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig(0.5, 0.5, window=0, group=4))
    understood, unlike = survey(model), "the model's is 'like_fa': call model.set_attn_implementation"
    assert understood.recipes
    model.set_attn_implementation("like_fa")
    with pytest.raises(cskv.CSKVError, match=unlike) as caught, compressed_reading(understood, adapter):
        pass
    assert "\n" not in str(caught.value)
    with pytest.raises(cskv.CSKVError, match=unlike):
        Divergence(understood)
    assert all(mask is None for mask in masks)


def test_a_layer_that_does_not_call_transformers_attention_is_refused() -> None:
    """It would read the exact tokens, and nothing would seem to be lost."""
    model = tiny_model("llama")
    adapter, module = truncated_adapter(model, CSKVConfig(0.5, 0.5, window=0, group=4)), model.model.layers[1].self_attn
    plain = module.forward
    module.forward = lambda *args, cskv_reading=None, **kwargs: plain(*args, **kwargs)
    with pytest.raises(cskv.CSKVError, match=r"layers\.1\.self_attn does not call transformers' attention interface"):
        Divergence(survey(model)).kl(adapter, TOKENS)
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())


def test_an_attached_model_is_read_all_the_same() -> None:
    model = tiny_model("llama")
    adapter, surveyed = truncated_adapter(model, CSKVConfig(0.5, 0.5, window=0, group=4)), survey(model)
    with compressed_reading(surveyed, adapter), torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    with cskv.attach(model, adapter), compressed_reading(surveyed, adapter), torch.no_grad():
        assert torch.equal(model(TOKENS, use_cache=False).logits, expected)


def test_a_layers_own_forward_comes_back() -> None:
    """Accelerate's `device_map` replaces the forward of each layer: checkpointing must call that one and leave it."""
    model = tiny_model("llama").requires_grad_(False)
    adapter = truncated_adapter(model, CSKVConfig(0.25, 0.25, window=0, group=4))
    layer, calls = model.model.layers[0], []
    plain = layer.forward

    def replaced(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return plain(*args, **kwargs)

    layer.forward = replaced
    Divergence(survey(model)).kl(adapter, TOKENS, checkpointed=True).backward()
    assert layer.forward is replaced
    assert len(calls) >= 3  # the exact forward, the compressed one, and again in the backward pass


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", FLASH), ("qwen3", FLASH), ("gemma2", FLASH), ("gpt-oss", KERNELS[0]), ("llama", FLEX), ("gemma2", FLEX)],
)
def test_flash_and_flex_models_are_read_as_eager_ones(family: str, name: str) -> None:
    """The stand-in takes no mask of queries and keys; the sliding layers of Gemma2 and GPT-OSS go on calling it."""
    found, gradients = [], []
    with standing_in() as calls, uncompiled_flex_attention():
        for implementation in ("eager", name):
            model = tiny_model(family).requires_grad_(False)
            model.config._attn_implementation = implementation
            adapter = truncated_adapter(model, CSKVConfig(0.5, 0.25, window=3, group=4))
            surveyed = survey(model)
            with compressed_reading(surveyed, adapter), torch.no_grad():
                found.append(model(TOKENS, use_cache=False).logits)
            calls.lengths.clear()
            if (family, implementation) == ("gemma2", FLEX):  # its sliding layers have no backward on a CPU
                break
            loss = Divergence(surveyed).kl(adapter, TOKENS, checkpointed=True)
            loss.backward()
            gradients.append([parameter.grad for parameter in adapter.parameters()])
            assert model.config._attn_implementation == implementation
    torch.testing.assert_close(*found, atol=1e-4 * float(found[0].abs().max()), rtol=1e-3)
    assert all(queries == keys for queries, keys in calls.lengths)  # it is never given old keys beside the exact ones
    for ours, theirs in zip(gradients[-1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_flash_attention_that_does_more_than_is_understood_is_refused() -> None:
    def doubled(*args: object, **kwargs: object) -> tuple:
        output, weights = flash_attention(*args, **kwargs)  # type: ignore[arg-type]
        return 2 * output, weights

    with standing_in() as calls:
        calls.function = doubled
        model = tiny_model("llama")
        model.config._attn_implementation = FLASH
        with pytest.raises(cskv.CSKVError, match=r"the model's is 'flash_attention_2': .*does more than is under"):
            Divergence(survey(model))


def test_a_window_that_only_flash_attention_is_told_is_refused() -> None:
    with standing_in():
        model = tiny_model("mistral")
        model.config._attn_implementation = FLASH
        adapter = truncated_adapter(model, CSKVConfig(0.5, 0.5, window=0, group=4))
        surveyed = survey(model)
        assert surveyed.recipes
        model.config.sliding_window = 12
        with (
            compressed_reading(surveyed, adapter),
            torch.no_grad(),
            pytest.raises(cskv.CSKVError, match=r"layers\.0\.self_attn reads a window of 12 tokens only"),
        ):
            model(TOKENS, use_cache=False)

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel, Qwen2Config

from cskv.adapter.base_model import BaseModelInfo
from cskv.calibration.calibrate import calibrate
from cskv.compression.initialise import Factorisation, in_few_bits, initialise
from cskv.compression.losses import observe_latents
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError, DataError
from cskv.factorization.svd import asvd_factors, svd_factors
from cskv.factorization.weighting import mixed_moments
from cskv.models.sites import find_sites
from cskv.models.survey import survey
from cskv.reading.divergence import Divergence
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import tiny_model


def tiny(config_class: type = LlamaConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


SAMPLES = [torch.arange(3, 33), torch.arange(9, 39)]
SHORT = CSKVConfig(window=4, group=4, sinks=0)  # some of a sample's 30 tokens are read from latents


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Phi3Config])
@pytest.mark.parametrize("init", ["svd", "asvd"])
def test_full_density_reproduces_every_projection(config_class: type, init: str) -> None:
    model = tiny(config_class)
    adapter = initialise(model, CSKVConfig(k_density=1.0, v_density=1.0, init=init), calibrate(model, SAMPLES, SHORT))
    x = torch.randn(5, 16)
    for site in find_sites(model):
        factors = adapter.factors(site.layer_idx)
        for ours, projection in ((factors.k, site.k), (factors.v, site.v)):
            exact = projection.select(projection.linear(x))
            torch.testing.assert_close(ours.expand(ours.latents(x)), exact, rtol=1e-4, atol=1e-5)
    assert (factors.k.bias is not None) == (config_class is Qwen2Config)


def test_each_layer_gets_its_own_weights_statistics_and_ranks() -> None:
    model = tiny()
    statistics = calibrate(model, SAMPLES, SHORT)
    adapter = initialise(model, CSKVConfig(k_density=0.25, v_density=0.5, init="asvd", asvd_alpha=0.7), statistics)
    assert adapter.base == BaseModelInfo.from_model(model)
    assert adapter.layer_indices == [0, 1]
    for i, layer in enumerate(model.model.layers):
        k = asvd_factors(layer.self_attn.k_proj.weight, statistics.get(i, "input.mean_abs"), 2, alpha=0.7)
        v = asvd_factors(layer.self_attn.v_proj.weight, statistics.get(i, "input.mean_abs"), 4, alpha=0.7)
        assert torch.equal(adapter.factors(i).k.up, k.up)
        assert torch.equal(adapter.factors(i).v.down, v.down)


def test_svd_ignores_statistics() -> None:
    model = tiny()
    adapter = initialise(model, CSKVConfig(k_density=0.5, v_density=0.5, init="svd"))
    expected = svd_factors(model.model.layers[1].self_attn.k_proj.weight, 4)
    assert torch.equal(adapter.factors(1).k.down, expected.down)


def test_asvd_without_statistics_is_refused() -> None:
    with pytest.raises(DataError, match="'asvd' needs calibration statistics, got none"):
        initialise(tiny(), CSKVConfig(init="asvd", k_density=0.5, v_density=0.5))


def test_statistics_of_another_model_are_refused() -> None:
    model = tiny()
    statistics = calibrate(model, SAMPLES, SHORT)
    other = dataclasses.replace(statistics, base=dataclasses.replace(statistics.base, model_type="gpt2"))
    with pytest.raises(AdapterError, match="model_type gpt2, this model has llama"):
        initialise(model, CSKVConfig(k_density=0.5, v_density=0.5), other)


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="rounds to rank 0"):
        initialise(tiny(), CSKVConfig(k_density=0.01, v_density=0.5, init="svd"))


def test_a_broken_weight_names_its_layer() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = math.inf
    with pytest.raises(DataError, match=r"layer 1 \(model\.layers\.1\.self_attn\): .* NaN or infinity"):
        initialise(model, CSKVConfig(k_density=0.5, v_density=0.5, init="svd"))


@pytest.mark.parametrize("settings", [{}, {"head_groups": 2}])
def test_few_bits_get_centred_latents_of_like_spread(settings: dict) -> None:
    """The same projection as in 16 bits, in another basis: nothing but rounding changes what is rebuilt."""
    model = tiny_model("llama-mha")
    statistics = statistics_of(model)
    plain, few = (
        initialise(model, CSKVConfig(0.5, 0.5, init="pca", k_bits=bits, v_bits=bits, **settings), statistics)
        for bits in (16, 4)
    )
    calibrated = torch.randint(3, 96, (6, 40), generator=torch.Generator().manual_seed(5))  # as in `statistics_of`
    spreads: dict[str, list[float]] = {"plain": [], "few": []}
    for name, adapter in (("plain", plain), ("few", few)):
        factors = {(0, "v"): adapter.factors(0).v}
        latents = torch.cat([rows[0] for _, rows in observe_latents(survey(model), factors, list(calibrated))])
        if name == "few":
            assert latents.mean(0).abs().max() < 1e-4 * latents.std()
        by_group = latents.std(0).unflatten(0, (adapter.factors(0).v.groups, -1))
        spreads[name] = (by_group.amax(1) / by_group.amin(1)).tolist()
    assert all(a < 0.7 * b for a, b in zip(spreads["few"], spreads["plain"], strict=True))
    x = torch.randn(5, plain.factors(0).v.hidden_size)
    rebuilt = [adapter.factors(0).v.expand(adapter.factors(0).v.latents(x)) for adapter in (plain, few)]
    torch.testing.assert_close(rebuilt[1], rebuilt[0], rtol=1e-4, atol=1e-5)


def test_an_adapter_is_put_in_few_bits() -> None:
    """As `initialise` does it, from the factors of a 16-bit adapter, which stays as it was."""
    model = tiny_model("llama")
    statistics = statistics_of(model)
    plain = initialise(model, CSKVConfig(0.5, 0.25, window=4, group=8, init="pca"), statistics)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    config = CSKVConfig(0.9, 0.9, window=0, group=4, init="svd", k_bits=4, v_bits=2, k_block=(4, 2))
    few = in_few_bits(plain, config, statistics)
    expected = CSKVConfig(0.5, 0.25, window=0, group=4, init="pca", k_bits=4, v_bits=2, k_block=(4, 2))
    assert few.config == expected
    made = initialise(model, expected, statistics)
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(few.state_dict()[name], tensor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert in_few_bits(plain, config).factors(0).k.down_bias is None
    with pytest.raises(ConfigError, match="adapter of 16-bit latents"):
        in_few_bits(few, config)


def test_mixed_widths_are_not_made_without_a_budget() -> None:
    with pytest.raises(ConfigError, match=r"use cskv\.compression\.budget\.allocate"):
        initialise(tiny_model("llama"), CSKVConfig(mixed_widths=True, init="svd"))


def test_spectra_are_what_ranks_save() -> None:
    model = tiny_model("llama-mha")
    statistics = statistics_of(model)
    for init in ("pca", "weighted-pca", "fisher-pca"):
        for key_factors in ("joint", "commuting"):
            config = CSKVConfig(init=init, key_factors=key_factors)
            for part, own in Factorisation(survey(model), config, statistics).components().items():
                assert own.spectrum.shape == (64,), part
                assert (own.spectrum.diff() <= 1e-12).all()
                assert (own.spectrum >= 0).all()
            if init == "pca":
                commuting = own.spectrum
    moment = statistics.get(1, "v.moment")
    mean = statistics.get(1, "v.mean")
    assert float(commuting.sum()) == pytest.approx(float((moment - torch.outer(mean, mean)).trace()))
    # By Fisher information they are nats: 1/2 tr(F C), C the covariance that components are taken of.
    named = (statistics.get(1, f"v.{name}") for name in ("mean", "moment", "coherent_mean", "coherent_moment"))
    mean, moment = mixed_moments(*named)
    nats = float((statistics.get(1, "v.fisher") * (moment - torch.outer(mean, mean))).sum()) / 2
    assert float(own.spectrum.sum()) == pytest.approx(nats, rel=1e-2)  # directions without a gradient count a little


def loud_where_nothing_listens() -> nn.Module:
    """Every other kv head: values that the output projection hardly reads, and keys that queries hardly do."""
    model, loud = tiny_model("llama-mha"), torch.arange(64) // 16 % 2 == 0
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.v_proj.weight.data[loud] *= 5
        attention.o_proj.weight.data[:, loud] *= 1e-3
        attention.k_proj.weight.data[loud] *= 5
        attention.q_proj.weight.data[loud] *= 1e-3
    return model


@pytest.mark.parametrize("settings", [{}, {"head_groups": 2}, {"key_factors": "commuting"}])
def test_factors_by_fisher_information_lose_least_of_the_predictions(settings: dict) -> None:
    model = loud_where_nothing_listens()
    statistics, divergence = statistics_of(model), Divergence(survey(model))
    text = torch.randint(3, 96, (1, 80), generator=torch.Generator().manual_seed(9))
    kl = {
        (init, density): divergence.kl(
            initialise(model, CSKVConfig(density, density, 0, 4, 0, init=init, **settings), statistics), text
        ).item()
        for init in ("pca", "fisher-pca")
        for density in (0.25, 0.5, 0.75)
    }
    assert kl["fisher-pca", 0.25] < kl["pca", 0.25]
    assert kl["fisher-pca", 0.5] < 0.1 * kl["pca", 0.5]
    assert kl["fisher-pca", 0.25] > kl["fisher-pca", 0.5] > kl["fisher-pca", 0.75]


def test_fisher_information_is_that_of_what_is_factorised() -> None:
    """With a norm of keys, joint factors are of what the projection puts out, commuting ones of what RoPE gets."""
    model = tiny_model("qwen3")
    statistics = statistics_of(model)

    def down(key_factors: str, changed: str) -> torch.Tensor:
        layers = {i: dict(layer) for i, layer in statistics.layers.items()}
        for layer in layers.values():
            layer[changed] = torch.diag(torch.linspace(0.01, 1.0, 32, dtype=torch.float64))
        config = CSKVConfig(0.5, 0.5, key_factors=key_factors)
        return initialise(model, config, dataclasses.replace(statistics, layers=layers)).factors(0).k.down

    for key_factors, used, unused in (("joint", "k", "key"), ("commuting", "key", "k")):
        made = initialise(model, CSKVConfig(0.5, 0.5, key_factors=key_factors), statistics).factors(0).k.down
        assert torch.equal(down(key_factors, f"{unused}.fisher"), made)
        assert torch.equal(down(key_factors, f"{unused}.coherent_moment"), made)
        assert not torch.allclose(down(key_factors, f"{used}.fisher"), made, atol=1e-2)
        assert not torch.allclose(down(key_factors, f"{used}.coherent_moment"), made, atol=1e-2)


def test_fisher_pca_says_what_it_lacks() -> None:
    model = tiny()
    with pytest.raises(DataError, match="init 'fisher-pca' needs calibration statistics, got none"):
        initialise(model, CSKVConfig(0.5, 0.5))
    plain = calibrate(model, SAMPLES, SHORT, fisher=False)
    with pytest.raises(DataError, match=r"layer 0 \(model.*lack k\..*; calibrate again with Fisher information"):
        initialise(model, CSKVConfig(0.5, 0.5), plain)


def test_latents_of_fisher_pca_have_the_scale_of_channels() -> None:
    """Nats of a token are far smaller than keys and values: unscaled latents would leave the range of float16."""
    model = tiny_model("llama")
    for (index, kind), own in Factorisation(survey(model), CSKVConfig(), statistics_of(model)).components().items():
        assert float(own.factors.up.square().sum(0).mean()) == pytest.approx(1.0, rel=1e-5), (index, kind)
        assert 0 < own.unit < 1
        up = own.factors.up.double()
        # A unit of squared error costs half of what Fisher information says of the columns of `up`.
        fisher = statistics_of(model).get(index, f"{kind}.fisher")
        costs = torch.einsum("cr,cd,dr->r", up, fisher, up) / 2
        assert float(costs.median()) == pytest.approx(own.unit, rel=1e-3), (index, kind)

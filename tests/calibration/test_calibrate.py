import dataclasses
import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel, Qwen2Config

from cskv.calibration.calibrate import calibrate
from cskv.config import CSKVConfig
from cskv.errors import DataError
from cskv.models.sites import find_sites

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SHORT = CSKVConfig(window=2, group=2, sinks=0)  # some of a sample's 12 tokens are read from latents


def tiny(config_class: type = LlamaConfig, dtype: torch.dtype = torch.float32, **changes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, **changes}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def random_samples(number: int = 5, length: int = 12) -> list[Tensor]:
    return list(torch.randint(3, 40, (number, length), generator=torch.Generator().manual_seed(1)))


def layer_inputs(model: PreTrainedModel, sample: Tensor) -> list[Tensor]:
    """Each layer's attention input by transformers' own `output_hidden_states`, not by the code under test."""
    with torch.no_grad():
        hidden = model(sample[None], output_hidden_states=True).hidden_states
        return [layer.input_layernorm(h)[0] for layer, h in zip(model.model.layers, hidden)]


def hooks_in(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Phi3Config])
def test_statistics_are_the_means_over_all_tokens(config_class: type) -> None:
    model, samples = tiny(config_class), random_samples()
    statistics = calibrate(model, samples, SHORT, covariance=True)
    assert statistics.tokens == 60
    inputs = [torch.cat(x).double() for x in zip(*(layer_inputs(model, sample) for sample in samples))]
    for site, x in zip(find_sites(model), inputs):
        torch.testing.assert_close(
            statistics.get(site.layer_idx, "input.mean_abs"), x.abs().mean(0), rtol=1e-5, atol=1e-6
        )
        for kind, projection in (("k", site.k), ("v", site.v)):
            y = x @ projection.weight.detach().double().T
            y = y if projection.bias is None else y + projection.bias.detach().double()
            torch.testing.assert_close(statistics.get(site.layer_idx, f"{kind}.mean"), y.mean(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                statistics.get(site.layer_idx, f"{kind}.moment"), y.T @ y / 60, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("fisher", [True, False])
def test_sinks_are_left_out(fisher: bool) -> None:
    """Means over the other tokens, which have seen the sinks; in the first layer nothing of them is left."""
    model, samples, config = tiny(), random_samples(), dataclasses.replace(SHORT, sinks=3)
    statistics = calibrate(model, samples, config, fisher=fisher)
    assert statistics.sinks == 3
    inputs = [torch.cat([own[3:] for own in x]).double() for x in zip(*(layer_inputs(model, s) for s in samples))]
    for site, x in zip(find_sites(model), inputs):
        torch.testing.assert_close(statistics.get(site.layer_idx, "input.mean"), x.mean(0), rtol=1e-4, atol=1e-6)
        for kind, projection in (("k", site.k), ("v", site.v)):
            y = x @ projection.weight.detach().double().T
            torch.testing.assert_close(statistics.get(site.layer_idx, f"{kind}.mean"), y.mean(0), rtol=1e-4, atol=1e-6)
            moment = statistics.get(site.layer_idx, f"{kind}.moment")
            torch.testing.assert_close(moment, y.T @ y / len(y), rtol=1e-4, atol=1e-6)
    others = [torch.cat([sample[:3].flip(0), sample[3:]]) for sample in samples]
    again = calibrate(model, others, config, fisher=fisher)
    fewer = calibrate(model, samples, dataclasses.replace(config, sinks=2), fisher=fisher)
    for name in ("input.mean_abs", "input.mean", "k.mean", "v.mean", "k.moment", "v.moment", "query.energy"):
        torch.testing.assert_close(again.get(0, name), statistics.get(0, name))
        assert not torch.allclose(fewer.get(0, name), statistics.get(0, name))


def test_samples_of_sinks_alone_are_refused() -> None:
    with pytest.raises(DataError, match="a sample has 12 tokens, and 12 sinks are left out of statistics") as caught:
        calibrate(tiny(), random_samples(), CSKVConfig(sinks=12), fisher=False)
    assert "\n" not in str(caught.value)
    assert calibrate(tiny(), random_samples(), CSKVConfig(sinks=11), fisher=False).get(0, "v.moment").trace() > 0


@pytest.mark.parametrize("fisher", [True, False])
def test_no_tensors_are_gathered(fisher: bool) -> None:
    """Nor graphs of backward passes: as many are there after ten samples as after three."""
    alive: list[tuple[int, int]] = []

    def count(done: int, _total: int | None) -> None:
        gc.collect()
        tensors = [own for own in gc.get_objects() if issubclass(type(own), Tensor)]
        tensors = [own for own in tensors if not own._has_symbolic_sizes_strides]  # torch.compile's, of other tests
        alive.append((len(tensors), sum(own.nbytes for own in tensors)))

    calibrate(tiny(), iter(random_samples(10)), SHORT, fisher=fisher, progress=count)
    assert len(set(alive[2:-1])) == 1


def test_batches_and_single_samples_agree() -> None:
    model, samples = tiny(), random_samples()
    one, batched = (
        calibrate(model, samples, SHORT, covariance=False),
        calibrate(model, [torch.stack(samples)], SHORT, covariance=False),
    )
    for i in one.layers:
        torch.testing.assert_close(one.get(i, "input.mean_abs"), batched.get(i, "input.mean_abs"), rtol=1e-5, atol=1e-7)
    assert not one.has_covariance


def test_bf16_models_are_summed_in_fp64() -> None:
    # bf16 sums stall after a few hundred terms; a long stream of one sample must keep that sample's mean.
    model, sample = tiny(dtype=torch.bfloat16), random_samples(1)[0]
    one, many = calibrate(model, [sample], SHORT), calibrate(model, [sample] * 300, SHORT)
    for i in one.layers:
        assert many.get(i, "input.mean_abs").dtype == torch.float64
        torch.testing.assert_close(one.get(i, "input.mean_abs"), many.get(i, "input.mean_abs"), rtol=1e-12, atol=0)


def test_samples_are_streamed_and_let_go() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for sample in random_samples(20):
            sample = sample.clone()
            alive.append(weakref.ref(sample))
            most = max(most, sum(ref() is not None for ref in alive))
            yield sample

    seen: list[tuple[int, int | None]] = []
    calibrate(tiny(), stream(), SHORT, progress=lambda done, total: seen.append((done, total)))
    assert most <= 2
    assert seen == [(i, None) for i in range(1, 21)]


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    calibrate(model, random_samples(), SHORT)
    assert model.training
    assert not model.model.layers[1].mlp.training
    assert hooks_in(model) == 0
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_model_comes_back_as_it_was_after_an_error() -> None:
    model = tiny().train()
    with pytest.raises(IndexError):
        calibrate(model, [random_samples(1)[0], torch.full((12,), 999)], SHORT)
    assert model.training
    assert hooks_in(model) == 0


def test_nan_names_the_layer() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(DataError, match=r"input\.mean of layer 1 holds NaN or infinity; after 12 tokens"):
        calibrate(model, random_samples(), SHORT, covariance=False)
    with pytest.raises(DataError, match=r"cached keys of model.layers.1.self_attn hold NaN"):
        calibrate(model, random_samples(), SHORT)


def test_no_samples_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        calibrate(tiny(), [], SHORT)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    """fp32 products of values around 3000 would lose variances of 1 altogether."""
    model = tiny(Qwen2Config)
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias.data.fill_(3000.0)
    samples = random_samples()
    statistics = calibrate(model, samples, SHORT)
    inputs = torch.cat([layer_inputs(model, sample)[0] for sample in samples]).double()
    exact = torch.cov((inputs @ model.model.layers[0].self_attn.v_proj.weight.detach().double().T).T, correction=0)
    mean, moment = statistics.get(0, "v.mean"), statistics.get(0, "v.moment")
    torch.testing.assert_close(
        moment - torch.outer(mean, mean), exact, rtol=1e-2, atol=1e-2 * float(exact.diagonal().max())
    )


def test_normalised_keys_and_query_energies_are_those_that_attention_sees() -> None:
    """Against what transformers itself passes to its attention function, which RoPE has turned but not resized."""
    from transformers import AttentionInterface, Qwen3Config
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, samples = tiny(Qwen3Config, head_dim=4), random_samples()
    torch.nn.init.normal_(model.model.layers[1].self_attn.k_norm.weight)
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_norm.weight)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def recording(module, query, key, value, mask, **kwargs):
        seen.setdefault(module.layer_idx, []).append((query.double(), key.double()))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recording", recording)
    statistics = calibrate(model, samples, SHORT)
    model.set_attn_implementation("recording")
    with torch.no_grad():
        for sample in samples:
            model(sample[None])
    queries, keys = (torch.cat([call[i] for call in seen[1]]) for i in (0, 1))
    energy = queries.square().mean((0, 2)).unflatten(0, (2, 2)).sum(1)
    pairs = statistics.get(1, "query.energy").unflatten(0, (2, 4))
    torch.testing.assert_close(pairs[:, :2] + pairs[:, 2:], energy[:, :2] + energy[:, 2:], rtol=1e-4, atol=1e-6)
    sizes = keys.square().mean((0, 2))
    moment = statistics.key_moment(1).diagonal().unflatten(0, (2, 4))
    torch.testing.assert_close(moment[:, :2] + moment[:, 2:], sizes[:, :2] + sizes[:, 2:], rtol=1e-4, atol=1e-6)
    assert torch.equal(statistics.key_moment(1), statistics.get(1, "key.moment"))


def test_without_a_norm_keys_are_what_the_projection_puts_out() -> None:
    statistics = calibrate(tiny(), random_samples(), SHORT)
    assert torch.equal(statistics.key_moment(0), statistics.get(0, "k.moment"))


def test_autocast_and_inference_mode_around_it_change_nothing() -> None:
    expected = calibrate(tiny(), random_samples(), SHORT)
    model = tiny()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = calibrate(model, random_samples(), SHORT)
    for i, layer in expected.layers.items():
        for name, tensor in layer.items():
            assert torch.equal(found.get(i, name), tensor)
            assert not found.get(i, name).is_inference()


def test_an_offloaded_model_is_calibrated_as_it_is() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, model = calibrate(tiny(), random_samples(), SHORT), tiny()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    found = calibrate(model, random_samples(), SHORT)
    for i, layer in expected.layers.items():
        assert all(torch.equal(found.get(i, name), tensor) for name, tensor in layer.items())

"""The weight that a layer multiplies by, however it is stored: packed, offloaded, or under a live LoRA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cskv
from cskv.compression.initialise import initialise
from cskv.models.compat import cache_kwarg, output_cache
from cskv.models.projection import Projection, features_of
from cskv.models.sites import find_sites
from tests.models.families import tiny_model

LOSSLESS = cskv.CSKVConfig(1.0, 1.0, window=0, group=4, init="svd")


class Packed(nn.Module):
    """A linear layer of integer codes and one scale a row, whose `weight` has neither the values nor the shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8).view(-1, 1), requires_grad=False)
        self.bias = linear.bias

    def dequantised(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features).to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


class Lora(nn.Module):
    """A layer and a live low-rank update of it; `weight` is the layer's, as in PEFT."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.down, self.up = nn.Linear(self.in_features, 4, bias=False), nn.Linear(4, self.out_features, bias=False)
        for part in (self.down, self.up):
            nn.init.normal_(part.weight, std=0.2, generator=generator)
        self.dropout = nn.Dropout(0.5)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(self.dropout(x)))


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Put other modules in place of every key, value and output projection."""
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, make(getattr(layer.self_attn, name)).eval())
    return model


def whole(linear: nn.Module, dtype: torch.dtype = torch.float32) -> Projection:
    return Projection(linear, 0, features_of(linear)[1], dtype)


@torch.no_grad()
def decoded(model: nn.Module) -> Tensor:
    """Logits of twelve tokens after a prompt, one by one."""
    ids = torch.randint(3, 90, (1, 30), generator=torch.Generator().manual_seed(1))
    output, logits = model(ids[:, :18], use_cache=True), []
    for i in range(18, 30):
        output = model(ids[:, i : i + 1], use_cache=True, **{cache_kwarg(model): output_cache(output)})
        logits.append(output.logits[0, -1])
    return torch.stack(logits).float()


def check_lossless(model: nn.Module, tolerance: float) -> None:
    """At full rank, factors of the model, attached to it, must change nothing beyond rounding."""
    own = decoded(model)
    with cskv.attach(model, initialise(model, LOSSLESS)):
        torch.testing.assert_close(decoded(model), own, rtol=0, atol=tolerance * float(own.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [slice(0, 24), slice(8, 20)])
def test_a_packed_weight_is_read_exactly_beside_a_bias_of_hundreds(dtype: torch.dtype, channels: slice) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 24).to(dtype)
    linear.bias.data *= 5000
    packed = Packed(linear)
    projection = Projection(packed, channels.start, channels.stop, dtype)
    assert projection.weight.dtype == torch.float32
    assert torch.equal(projection.weight, packed.dequantised()[channels].detach().float())
    assert torch.equal(projection.bias, linear.bias[channels].detach().float())
    assert packed.bias is linear.bias  # it was away for a while
    assert projection.in_features == 300


def test_a_plain_weight_is_a_view() -> None:
    linear = nn.Linear(6, 4)
    projection = Projection(linear, 1, 3, torch.float32)
    assert projection.weight.data_ptr() == linear.weight[1].data_ptr()
    assert projection.bias.data_ptr() == linear.bias[1].data_ptr()
    assert whole(nn.Linear(6, 4, bias=False)).bias is None


def test_a_live_lora_counts_and_its_dropout_does_not() -> None:
    layer = Lora(nn.Linear(16, 8)).train()
    projection = whole(layer)
    expected = layer.base_layer.weight + layer.up.weight @ layer.down.weight
    torch.testing.assert_close(projection.weight, expected.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(projection.bias, layer.bias.detach())
    assert all(part.training for part in layer.modules())


def test_autocast_around_a_packed_weight_rounds_nothing() -> None:
    packed = Packed(nn.Linear(16, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(packed).weight, packed.dequantised().detach())
    with torch.inference_mode():
        assert not whole(packed).weight.is_inference()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("make", [Packed, Lora])
def test_factors_of_a_packed_model_lose_nothing_at_full_rank(make: type, family: str) -> None:
    check_lossless(replaced(tiny_model(family), make), 1e-4)


def test_the_output_projection_may_be_packed() -> None:
    model = tiny_model("llama")
    expected = [Packed(layer.self_attn.o_proj).dequantised().detach() for layer in model.model.layers]
    sites = find_sites(replaced(model, Packed))
    for site, weight in zip(sites, expected, strict=True):
        assert torch.equal(site.output_weight, weight)
        assert (site.hidden_size, site.kv_dim) == (64, 32)


def test_an_offloaded_model_is_the_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, offloaded = tiny_model("qwen2"), tiny_model("qwen2")
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].self_attn.k_proj.weight.is_meta
    for site, expected in zip(find_sites(offloaded), find_sites(plain), strict=True):
        assert torch.equal(site.k.weight, expected.k.weight)
        assert torch.equal(site.v.bias, expected.v.bias)
    check_lossless(offloaded, 1e-4)


def test_what_is_no_linear_layer_is_refused() -> None:
    class Clipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-0.5, 0.5)

    class Untold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(cskv.UnsupportedModelError, match="Clipped is no linear map"):
        _ = whole(Clipped(32, 8)).weight
    with pytest.raises(cskv.UnsupportedModelError, match="Untold does not tell its in_features"):
        features_of(Untold())
    with pytest.raises(cskv.UnsupportedModelError, match="weights of Linear are on no device"):
        _ = whole(nn.Linear(4, 4, device="meta")).weight


def bitsandbytes_8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, False)
    layer.weight, layer.bias = bnb.nn.Int8Params(linear.weight.data, False, False), linear.bias
    return layer.to("cpu")


def bitsandbytes_4(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None)
    layer.weight, layer.bias = bnb.nn.Params4bit(linear.weight.data, False), linear.bias
    return layer.to("cpu")


def hqq(linear: nn.Linear) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    return quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def quanto(linear: nn.Linear) -> nn.Module:
    package = pytest.importorskip("optimum.quanto")
    holder = nn.Sequential(linear)
    package.quantize(holder, weights=package.qint8)
    package.freeze(holder)
    return holder[0]


def torchao(linear: nn.Linear) -> nn.Module:
    package = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    package.quantize_(holder, package.Int8WeightOnlyConfig())
    return holder[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("pack", "tolerance"),
    # bitsandbytes rounds activations to 8 bits, or reads a weight of 4 bits through 16-bit arithmetic.
    [(bitsandbytes_8, 5e-2), (bitsandbytes_4, 0.1), (hqq, 1e-4), (quanto, 1e-4), (torchao, 1e-4)],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packages_that_pack_weights(pack: Callable, tolerance: float, family: str) -> None:
    check_lossless(replaced(tiny_model(family), pack), tolerance)


@pytest.mark.filterwarnings("ignore")
def test_a_live_lora_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    check_lossless(model.eval(), 1e-4)

"""The signature of a model's weights: near for the same checkpoint in any form, far for another one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import save_file
from torch import Tensor, nn

from cskv.adapter.base_model import PACKED, ROUNDING, Signature
from cskv.errors import CSKVError
from cskv.models.signature import read_signature
from cskv.models.sites import find_sites
from cskv.models.survey import survey
from tests.models.families import tiny_model


def signature(model: nn.Module) -> Signature:
    found = survey(model).base.signature
    assert found is not None
    return found


def projections(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(layer.self_attn, name) for layer in model.model.layers for name in ("k_proj", "v_proj")]


def with_projections(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    for attention, name in projections(model):
        setattr(attention, name, make(getattr(attention, name)))
    return model


class LoRA(nn.Module):
    """A live one, as PEFT wraps a projection: its `weight` is the base's."""

    def __init__(self, base: nn.Linear, size: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.base_layer, self.dropout = base, nn.Dropout(0.5)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=generator).to(base.weight))
        self.b = nn.Parameter(size * torch.randn(base.out_features, 2, generator=generator).to(base.weight))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.dropout(x) @ self.a.T @ self.b.T


class Packed(nn.Module):
    """Codes of some bits with a scale per 32 weights."""

    def __init__(self, base: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        blocks = base.weight.detach().unflatten(1, (-1, 32))
        self.scale = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        self.weight = nn.Parameter((blocks / self.scale).round().flatten(1).to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.unflatten(1, (-1, 32)) * self.scale).flatten(1)
        return nn.functional.linear(x, weight.to(x), self.bias)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """With biases of hundreds on its keys, as Qwen2 has them."""
    made = tiny_model("qwen2", hidden_size=128)
    for layer in made.model.layers:
        layer.self_attn.k_proj.bias.data.mul_(1000)
    return made


def test_it_estimates_how_far_weights_are_apart() -> None:
    deep = tiny_model("llama", num_hidden_layers=12)
    other = copy.deepcopy(deep)
    generator = torch.Generator().manual_seed(0)
    for attention, name in projections(other):
        weight = getattr(attention, name).weight
        weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    assert signature(deep).difference(signature(other)) == pytest.approx(0.1, rel=0.4)
    assert signature(deep).difference(signature(copy.deepcopy(deep))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_rounding_to_a_short_dtype_is_near(model: nn.Module, dtype: torch.dtype, wrapped: bool) -> None:
    """Also where the projection can only be run, bias and all."""
    other = with_projections(model, (lambda base: LoRA(base, 0.0)) if wrapped else (lambda base: base)).to(dtype)
    assert signature(model).difference(signature(other)) < ROUNDING / 2
    assert signature(model).tolerance(signature(other)) == ROUNDING


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.2)])
def test_the_same_weights_in_few_bits_are_near_enough(model: nn.Module, bits: int, most: float) -> None:
    ours, theirs = signature(model), signature(with_projections(model, lambda base: Packed(base, bits)))
    assert 0 < ours.difference(theirs) < most
    assert ours.tolerance(theirs) == theirs.tolerance(ours) == PACKED


def test_a_live_lora_is_noticed_and_belongs_to_itself(model: nn.Module) -> None:
    tuned = with_projections(model, lambda base: LoRA(base, 0.05)).train()  # dropout is off for a signature
    assert signature(model).difference(signature(tuned)) > 5 * ROUNDING
    assert signature(tuned) == signature(tuned)
    assert tuned.training


def test_fused_projections_are_told_apart() -> None:
    phi, other = tiny_model("phi3"), tiny_model("phi3")
    site = find_sites(other)[0]
    with torch.no_grad():
        site.q.weight.mul_(-1)  # not ours
    assert signature(phi).difference(signature(other)) == 0
    with torch.no_grad():
        site.v.weight.mul_(1.3)
    assert signature(phi).difference(signature(other)) > 5 * ROUNDING


def test_an_offloaded_model_has_the_signature_that_it_has_at_home(model: nn.Module) -> None:
    away = copy.deepcopy(model)
    cpu_offload(away, execution_device=torch.device("cpu"))
    assert find_sites(away)[0].k.linear.weight.is_meta
    assert signature(model).difference(signature(away)) < 1e-3


def test_weights_that_are_nowhere_have_none() -> None:
    model = tiny_model("llama").to("meta")
    with pytest.warns(UserWarning, match=r"weights of model\.layers\.0\.self_attn are not at hand"):
        assert survey(model).base.signature is None


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_files_have_the_signature_of_their_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, num_hidden_layers=3)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    found = read_signature(files, find_sites(model))
    assert found is not None
    assert signature(model).difference(found) < 1e-4
    assert read_signature(files[: len(files) // 2], find_sites(model)) is None
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(CSKVError, match="truncated or corrupted .* copy or download the model again"):
        read_signature(files, find_sites(model))


def test_packed_weights_in_files_have_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    names = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in (0, 1) for kind in "kv"]
    save_file({name: torch.zeros(32, 64, dtype=torch.int8) for name in names}, tmp_path / "model.safetensors")
    assert read_signature([tmp_path / "model.safetensors"], find_sites(model)) is None

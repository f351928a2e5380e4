import pytest
import torch

from cskv.adapter.adapter import CSKVAdapter
from cskv.adapter.base_model import BaseModelInfo
from cskv.calibration.hooks import Observation, Teacher
from cskv.config import CSKVConfig
from cskv.factorization.factors import Factors, LayerFactors
from cskv.models.sites import find_sites
from cskv.training.objective import Reconstruction
from tests.training.tiny import tiny_model, token_samples, untrained


def test_the_loss_is_the_mean_square_summed_over_layers() -> None:
    # Layer 0 rebuilds k = 2x and v = 3x + 1 from one channel; layer 1 the same. All worked out by hand.
    def layer() -> LayerFactors:
        return LayerFactors(
            k=Factors(torch.tensor([[1.0]]), torch.tensor([[2.0]])),
            v=Factors(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([1.0])),
        )

    base = BaseModelInfo("", "llama", 1, 2)
    objective = Reconstruction(CSKVAdapter(CSKVConfig(), {0: layer(), 1: layer()}, base))
    x = torch.tensor([[[1.0], [2.0]]])  # k^ = 2, 4 and v^ = 4, 7
    zero = torch.zeros(1, 2, 1)
    k_loss, v_loss = objective({0: Observation(x, zero, x), 1: Observation(x, x, zero)})
    assert k_loss.item() == (4 + 16) / 2 + (1 + 4) / 2
    assert v_loss.item() == (9 + 25) / 2 + (16 + 49) / 2


def test_the_teacher_sees_inputs_and_exact_keys_and_values() -> None:
    model, sample = tiny_model(), token_samples(1)[0]
    sites = find_sites(model)
    teacher = Teacher(model, sites)
    with teacher.watching():
        assert not model.training
        seen = teacher.observe(sample[None])
    assert model.training
    with torch.no_grad():
        hidden = model.eval()(sample[None], output_hidden_states=True).hidden_states
    for site, h, block in zip(sites, hidden, model.model.layers):
        x, k, v = seen[site.layer_idx]
        torch.testing.assert_close(x, block.input_layernorm(h))
        torch.testing.assert_close(k, site.k.linear(x))
        torch.testing.assert_close(v, site.v.linear(x))
        assert not x.requires_grad
        assert not k.requires_grad


def test_full_rank_has_no_loss_and_half_rank_has() -> None:
    model, sample = tiny_model(), token_samples(1)[0]
    teacher = Teacher(model, find_sites(model))
    with teacher.watching():
        seen = teacher.observe(sample[None])
    assert Reconstruction(untrained(model, 1.0))(seen).sum() < 1e-9
    assert Reconstruction(untrained(model, 0.5))(seen).min() > 1e-3


def test_gradients_reach_every_factor_and_nothing_else() -> None:
    model, sample = tiny_model(), token_samples(1)[0]
    adapter = untrained(model)
    teacher = Teacher(model, find_sites(model))
    with teacher.watching():
        Reconstruction(adapter)(teacher.observe(sample[None])).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bf16_products_give_nearly_the_fp32_loss() -> None:
    model, sample = tiny_model(torch.bfloat16), token_samples(1)[0]
    adapter = untrained(model)
    teacher = Teacher(model, find_sites(model))
    with teacher.watching():
        seen = teacher.observe(sample[None])
    exact, rough = Reconstruction(adapter)(seen), Reconstruction(adapter, bf16=True)(seen)
    assert exact.dtype == rough.dtype == torch.float32
    assert exact.tolist() != rough.tolist()
    assert rough.tolist() == pytest.approx(exact.tolist(), rel=0.03)

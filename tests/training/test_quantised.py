"""Training through the grid: the loss is that of what the cache would read, and training lowers it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cskv.adapter.adapter import BaseModelInfo, CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.calibration.hooks import Observation, Teacher
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.factorization.factors import Factors, LayerFactors
from cskv.models.sites import find_sites
from cskv.quantization.grid import Grid, dequantise, quantise
from cskv.training.objective import Reconstruction
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train
from tests.training.tiny import tiny_model, token_samples

TWO_BITS = CSKVConfig(0.75, 0.75, group=16, init="pca", k_bits=2, v_bits=2, v_block=(16, 2))
EXACT = replace(TWO_BITS, k_bits=16, v_bits=16)
MIXED = replace(EXACT, mixed_widths=True)
WIDTHS = {
    (0, "k"): ((3, 2), (2, 4)),
    (0, "v"): ((2, 6),),
    (1, "k"): ((4, 1), (2, 5)),
    (1, "v"): ((4, 1), (3, 2), (2, 3)),
}


def adapter_of(model, config: CSKVConfig, samples: list[Tensor] | None = None) -> CSKVAdapter:
    statistics = calibrate(model, samples or token_samples(16), CSKVConfig(sinks=0), fisher=False)
    plain = initialise(model, replace(config, mixed_widths=False, k_bits=2, v_bits=2), statistics)
    layers = {i: plain.factors(i) for i in plain.layer_indices}
    return CSKVAdapter(config, layers, plain.base, widths=WIDTHS if config.mixed_widths else None)


def observed(model, samples: list[Tensor]) -> dict[int, Observation]:
    teacher = Teacher(model, find_sites(model))
    with teacher.watching():
        return teacher.observe(torch.stack(samples))


def losses(adapter: CSKVAdapter, observations: dict[int, Observation]) -> Tensor:
    with torch.no_grad():
        return Reconstruction(adapter)(observations)


def test_a_loss_by_hand() -> None:
    """Latents 0, 1, 2, 6 are read as 0, 0, 2, 6, so k^ = 2x is off by 2 at the second token and v^ not at all."""
    layer = LayerFactors(
        k=Factors(torch.tensor([[1.0]]), torch.tensor([[2.0]])), v=Factors(torch.tensor([[1.0]]), torch.tensor([[1.0]]))
    )
    config = CSKVConfig(1.0, 1.0, group=4, k_bits=2)
    x = torch.tensor([0.0, 1, 2, 6])[None, :, None]
    adapter = CSKVAdapter(config, {0: layer}, BaseModelInfo("", "llama", 1, 1))
    assert losses(adapter, {0: Observation(x, 2 * x, x)}).tolist() == [2**2 / 4, 0]


@pytest.mark.parametrize("config", [TWO_BITS, MIXED], ids=["uniform", "mixed"])
def test_the_loss_is_that_of_what_is_read_back(config: CSKVConfig) -> None:
    model = tiny_model()
    adapter = adapter_of(model, config)
    observations = observed(model, token_samples(3, length=21))  # the second block is short
    expected = [0.0, 0.0]
    for index, (x, *exact) in observations.items():
        factors = adapter.factors(index)
        for i, (own, kind, y) in enumerate(zip((factors.k, factors.v), "kv", exact)):
            runs = WIDTHS[index, kind] if config.mixed_widths else ((2, 6),)
            channels = 2 if kind == "v" else 4 if config.mixed_widths else 1
            grid = Grid(runs, 16, channels)
            read = dequantise(*quantise((x @ own.down.T + own.down_bias).detach(), grid), grid)
            expected[i] += (read @ own.up.T + own.bias - y).square().mean().item()
    assert losses(adapter, observations).tolist() == pytest.approx(expected, rel=1e-5)
    assert (losses(adapter, observations) > 1.5 * losses(adapter_of(model, EXACT), observations)).all()


@pytest.mark.parametrize("config", [TWO_BITS, MIXED], ids=["uniform", "mixed"])
def test_gradients_reach_every_factor(config: CSKVConfig) -> None:
    model = tiny_model()
    adapter = adapter_of(model, config)
    Reconstruction(adapter)(observed(model, token_samples(2))).sum().backward()
    named = dict(adapter.named_parameters())
    assert len(named) == 2 * 2 * 2
    for name, parameter in named.items():
        assert torch.isfinite(parameter.grad).all(), name
        side = 1 if name.endswith("down") else 0
        assert (parameter.grad.abs().sum(side) > 0).all(), name  # of every latent
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("config", [TWO_BITS, MIXED], ids=["uniform", "mixed"])
def test_training_on_the_grid_beats_rounding_afterwards(config: CSKVConfig) -> None:
    """On text that was not trained on. Training of the same factors without the grid does not help."""
    model, texts = tiny_model(), token_samples(96)
    trained_on, held_out = texts[:64], observed(model, texts[64:])
    settings = TrainingSettings(learning_rate=1e-2, schedule="cosine", epochs=10, batch_size=8)
    ours, exact = adapter_of(model, config, trained_on), adapter_of(model, EXACT, trained_on)
    before = losses(ours, held_out)
    train(model, ours, trained_on, settings)
    train(model, exact, trained_on, settings)
    rounded = CSKVAdapter(config, {i: exact.factors(i) for i in exact.layer_indices}, exact.base, widths=ours.widths)
    assert (losses(ours, held_out) < 0.95 * before).all()
    assert (losses(ours, held_out) < 0.95 * losses(rounded, held_out)).all()

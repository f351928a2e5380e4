"""End-to-end training: it goes below the divergence of the best reconstruction, and resumes like any run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cskv import ConfigError, CSKVConfig
from cskv.compression.initialise import initialise
from cskv.models.survey import survey
from cskv.reading.divergence import Divergence
from cskv.training.log import read_log
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import tiny_model

CONFIG = CSKVConfig(0.25, 0.25, window=0, group=4, init="pca")
SETTINGS = TrainingSettings(objective="distillation", learning_rate=3e-3, batch_size=2, checkpoint_every=3)


def samples(number: int, seed: int) -> list[Tensor]:
    return list(torch.randint(3, 96, (number, 48), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_lowers_the_divergence_below_pcas(family: str) -> None:
    model = tiny_model(family)
    statistics = statistics_of(model)
    texts = samples(4, seed=1)
    before = Divergence(survey(model)).mean(initialise(model, CONFIG, statistics), texts)
    adapter = initialise(model, CONFIG, statistics)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = train(model, adapter, texts, dataclasses.replace(SETTINGS, epochs=20))
    assert Divergence(survey(model)).mean(adapter, texts) < 0.8 * before
    assert result.loss > 0
    assert (result.k_loss, result.v_loss) == (None, None)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_gradient_checkpointing_changes_memory_only() -> None:
    model = tiny_model("llama")
    adapters = [initialise(model, CONFIG, statistics_of(model)) for _ in range(2)]
    for adapter, checkpointing in zip(adapters, (False, True), strict=True):
        train(model, adapter, samples(6, seed=1), dataclasses.replace(SETTINGS, gradient_checkpointing=checkpointing))
    for plain, checkpointed in zip(*(adapter.parameters() for adapter in adapters), strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_ends_bit_identically(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole, resumed = (initialise(model, CONFIG, statistics_of(model)) for _ in range(2))
    train(model, whole, samples(16, seed=1), SETTINGS, output=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(record) -> None:
        if record.step == 5:
            raise Stop

    with pytest.raises(Stop):
        train(model, resumed, samples(16, seed=1), SETTINGS, output=tmp_path / "cut", on_step=stop)
    resumed = initialise(model, CONFIG, statistics_of(model))
    result = train(model, resumed, samples(16, seed=1), SETTINGS, output=tmp_path / "cut")
    assert result.resumed_from == 3
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    records = read_log(tmp_path / "cut" / "train_log.jsonl")
    assert [record.step for record in records] == list(range(1, 9))
    assert all(record.loss > 0 and record.k_loss is None for record in records)


def test_a_run_with_another_objective_is_not_continued(tmp_path: Path) -> None:
    model = tiny_model("llama")
    train(model, initialise(model, CONFIG, statistics_of(model)), samples(4, seed=1), SETTINGS, output=tmp_path)
    other = dataclasses.replace(SETTINGS, objective="reconstruction")
    with pytest.raises(ValueError, match=r"objective 'distillation' \(now 'reconstruction'\)"):
        train(model, initialise(model, CONFIG, statistics_of(model)), samples(4, seed=1), other, output=tmp_path)


def test_mixed_precision_is_for_reconstruction() -> None:
    with pytest.raises(ConfigError, match="mixed_precision is for reconstruction"):
        TrainingSettings(objective="distillation", mixed_precision="bf16")
    with pytest.raises(ConfigError, match="gradient_checkpointing is for distillation"):
        TrainingSettings(gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="objective is 'rl'; expected one of reconstruction, distillation"):
        TrainingSettings(objective="rl")

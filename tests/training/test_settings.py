import math

import pytest

from cskv.errors import ConfigError
from cskv.training.settings import TrainingSettings


def test_the_warm_up_is_linear_and_then_constant() -> None:
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=4)
    assert [settings.learning_rate_at(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_falls_from_the_peak_towards_zero() -> None:
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=2, schedule="cosine")
    rates = [settings.learning_rate_at(step, 6) for step in range(6)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 1 - math.cos(math.pi / 4)])


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert [settings.learning_rate_at(step, 2) for step in range(2)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("epochs", 0, "at least 1"),
        ("max_steps", 0, "at least 1"),
        ("warmup_steps", -1, "at least 0"),
        ("batch_size", 1.5, "whole number"),
        ("accumulation", True, "whole number"),
        ("weight_decay", -0.1, "at least 0"),
        ("max_grad_norm", 0, "above 0"),
        ("schedule", "step", "constant, cosine"),
        ("mixed_precision", "fp8", "no, bf16"),
        ("checkpoint_every", 0, "at least 1"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*{message}"):
        TrainingSettings(**{name: value})  # type: ignore[arg-type]

"""The settings of training: one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cskv.config import is_number
from cskv.errors import ConfigError

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("no", "bf16")
OBJECTIVES = ("reconstruction", "distillation")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of training a compressor. The defaults are the paper's (section 3.2).

    Attributes:
        objective: "reconstruction" of keys and values, layer by layer (the paper's), or end-to-end "distillation" of
            the uncompressed model's predictions.
        learning_rate: AdamW's peak rate. 5e-5 suits billion-parameter models over thousands of steps; small models and
            short runs take 1e-3 and more.
        warmup_steps: optimiser steps over which the rate rises linearly from 0.
        schedule: what follows the warm-up: "constant", or "cosine" (down to 0 at the last step).
        epochs: passes over the samples.
        max_steps: stop after this many optimiser steps, or None for all epochs.
        batch_size: samples in one forward of one process.
        accumulation: forwards of one process per optimiser step.
        weight_decay: AdamW's decoupled decay. The paper names none.
        max_grad_norm: clip the gradient of all factors to this norm; None does not clip.
        mixed_precision: "no" computes in fp32, "bf16" the factors' products in bf16. Master weights are always fp32.
        gradient_checkpointing: distillation runs every decoder layer a second time in the backward pass instead of
            keeping its activations: one layer's at a time, for a third more computation.
        checkpoint_every: optimiser steps between checkpoints; the last step has one in any case.

    Raises:
        ConfigError: a value is out of range.
    """

    objective: str = "reconstruction"
    learning_rate: float = 5e-5
    warmup_steps: int = 0
    schedule: str = "constant"
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 1
    accumulation: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        least = {"warmup_steps": 0, "epochs": 1, "batch_size": 1, "accumulation": 1, "checkpoint_every": 1}
        if self.max_steps is not None:
            least["max_steps"] = 1
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ConfigError(f"{name} is {value!r}; expected a whole number, at least {smallest}")
        if not is_number(self.learning_rate) or self.learning_rate <= 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate!r}; expected a number above 0, the paper's is 5e-5"
            )
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay!r}; expected a number, at least 0")
        if self.max_grad_norm is not None and (not is_number(self.max_grad_norm) or self.max_grad_norm <= 0):
            raise ConfigError(f"max_grad_norm is {self.max_grad_norm!r}; expected a number above 0, or None")
        for name, choices in (("objective", OBJECTIVES), ("schedule", SCHEDULES), ("mixed_precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.objective == "distillation" and self.mixed_precision != "no":
            raise ConfigError("mixed_precision is for reconstruction; distillation computes in the base model's dtype")
        if self.gradient_checkpointing and self.objective != "distillation":
            raise ConfigError("gradient_checkpointing is for distillation; reconstruction keeps no activations anyway")

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of optimiser step `step`, counted from 0, of a run of `total_steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return dataclasses.asdict(self)

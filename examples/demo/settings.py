"""Settings of the demo: what it compares, and how much work it puts into it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from cskv.config import CSKVConfig
from cskv.errors import ConfigError
from cskv.training.settings import TrainingSettings

CACHE: dict[str, Any] = {"window": 32, "group": 32}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        key: its name in files.
        name: its name in the table.
        density: share of the key and of the value channels kept; None for the uncompressed model.
        init: how the factors are made.
        trained: whether layer-wise reconstruction follows the initialisation.
        allocated: ranks are dealt out over layers, keys and values, within the density.
        mixed: ranks and widths of 2 to 8 bits are chosen for `DemoSettings.byte_ratio`, instead of a density.
    """

    key: str
    name: str
    density: float | None = None
    init: str = "asvd"
    trained: bool = False
    allocated: bool = False
    mixed: bool = False

    @property
    def is_compressed(self) -> bool:
        """False for the uncompressed model alone."""
        return self.density is not None or self.mixed

    @property
    def config(self) -> CSKVConfig:
        """The newest 32 tokens are exact at any time, so that a question is; older ones are sealed 32 at a time."""
        if self.mixed:
            return CSKVConfig(init=self.init, **CACHE)
        if self.density is None:
            raise ConfigError(f"variant {self.name} is not compressed and has no settings")
        return CSKVConfig(k_density=self.density, v_density=self.density, init=self.init, **CACHE)


VARIANTS = (
    Variant("uncompressed", "uncompressed"),
    Variant("50-trained", "50 % trained", 0.5, "asvd", trained=True),
    Variant("80-svd", "80 % SVD, untrained", 0.2, "svd"),
    Variant("80-asvd", "80 % ASVD, untrained", 0.2, "asvd"),
    Variant("80-trained", "80 % trained", 0.2, "asvd", trained=True),
    Variant("80-pca", "80 % PCA, allocated ranks, untrained", 0.2, "fisher-pca", allocated=True),
    Variant("mixed", "mixed widths, untrained", init="fisher-pca", mixed=True),
)
EXAMPLE = "80-trained"


@dataclass(frozen=True)
class DemoSettings:
    """Amounts of calibration, training and measurement. The defaults take some four minutes on two CPU cores.

    Attributes:
        num_lines: lines per LongEval record.
        cases: LongEval questions per variant.
        batch_size: questions, or texts, in one forward.
        seed: of the order of the calibration and training text, and of the records in it.
        sample_len: tokens per calibration and training sample.
        calibration_samples, train_samples: how many of each; training goes over them once.
        allocation_samples: samples that ranks and widths are dealt out by.
        byte_ratio: share of the uncompressed bytes that sealed tokens take in mixed widths.
        learning_rate, train_batch_size: of the training, with a cosine schedule.
        texts, text_tokens: held-out documents for the perplexity, and the tokens taken of each.
        speed_repeats: stretches of 32 decoded tokens, of which the median is the speed.
    """

    num_lines: int = 200
    cases: int = 80
    batch_size: int = 4
    seed: int = 0
    sample_len: int = 1024
    calibration_samples: int = 64
    train_samples: int = 600
    allocation_samples: int = 8
    byte_ratio: float = 0.044
    learning_rate: float = 2e-3
    train_batch_size: int = 2
    texts: int = 16
    text_tokens: int = 1024
    speed_repeats: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("seed", "learning_rate", "byte_ratio") and value < 1:
                raise ConfigError(f"{field.name} is {value}; expected at least 1")
        if self.train_samples < self.train_batch_size:
            raise ConfigError(
                f"train_samples is {self.train_samples}; expected at least one batch, {self.train_batch_size}"
            )

    @property
    def training(self) -> TrainingSettings:
        """Return the settings of training."""
        steps = self.train_samples // self.train_batch_size
        return TrainingSettings(
            learning_rate=self.learning_rate,
            warmup_steps=min(20, steps // 10),
            schedule="cosine",
            batch_size=self.train_batch_size,
            checkpoint_every=100,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)


def fast_dtype() -> str:
    """Return "auto", the checkpoint's own dtype, or "float32" on a CPU that would emulate bf16, many times slower."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return "auto"
    has_kernels = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "auto" if has_kernels else "float32"

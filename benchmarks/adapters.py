"""Adapters for the bundled model, made from a recipe: calibrated, factorised, and trained where it says so."""

from __future__ import annotations

import copy
import functools
import time
from dataclasses import dataclass, field, replace
from typing import Any

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.budget import allocate_ranks, allocate_widths
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.data.mixed import mixed_source
from cskv.data.samples import TokenSamples
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train

NUM_LINES, SAMPLE_LEN = 200, 1024
CALIBRATION_SAMPLES, ALLOCATION_SAMPLES = 32, 8
WINDOW = GROUP = 32


@dataclass(frozen=True)
class Recipe:
    """One way to make an adapter.

    Attributes:
        settings: of `CSKVConfig`, besides window and group.
        allocated: ranks are dealt out by sensitivity within the density.
        ratio: the byte budget of mixed widths.
        training, samples: gradient training that follows, and on how many samples.
        calibration: samples of calibration text.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    allocated: bool = False
    ratio: float | None = None
    training: TrainingSettings | None = None
    samples: int = 0
    calibration: int = CALIBRATION_SAMPLES

    @property
    def config(self) -> CSKVConfig:
        return CSKVConfig(**({"window": WINDOW, "group": GROUP} | self.settings))

    def at(self, density: float) -> Recipe:
        """Return the recipe at a density of keys and values."""
        return replace(self, settings=self.settings | {"k_density": density, "v_density": density})


class Maker:
    """Makes adapters from the text of one seed. What several recipes need is made once.

    Args:
        model: the bare model.
        tokenizer: its own.
        seed: of calibration and training text.
    """

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.calibrated = functools.cache(self._calibrated)
        self._mixed = functools.cache(self._in_mixed_widths)

    def samples(self, count: int) -> TokenSamples:
        """Return samples of offline text and LongEval records, half and half."""
        return TokenSamples(mixed_source(NUM_LINES), self.tokenizer, count, SAMPLE_LEN, self.seed)

    def statistics(self, count: int) -> Statistics:
        """Return the statistics of so many samples."""
        return self.calibrated(count)[0]

    def make(self, recipe: Recipe) -> CSKVAdapter:
        """Make an adapter."""
        adapter = self._untrained(recipe)
        if recipe.training is not None:
            train(self.model, adapter, self.samples(recipe.samples), recipe.training)
        return adapter

    def _untrained(self, recipe: Recipe) -> CSKVAdapter:
        config = recipe.config
        if recipe.ratio is not None:
            return copy.deepcopy(self._mixed(config, recipe.ratio, recipe.calibration))
        statistics = self.statistics(recipe.calibration)
        if not recipe.allocated:
            return initialise(self.model, config, statistics)
        samples = list(self.samples(ALLOCATION_SAMPLES))
        return allocate_ranks(self.model, config, statistics, samples, config.k_density).adapter

    def _in_mixed_widths(self, config: CSKVConfig, ratio: float, calibration: int) -> CSKVAdapter:
        samples = list(self.samples(ALLOCATION_SAMPLES))
        return allocate_widths(self.model, config, self.statistics(calibration), samples, ratio).adapter

    def _calibrated(self, count: int) -> tuple[Statistics, float]:
        """Calibrate, and return the seconds that it took as well."""
        began = time.perf_counter()
        return calibrate(self.model, self.samples(count)), time.perf_counter() - began

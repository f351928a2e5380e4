"""Adapters by recipes, made once for a model and a seed and kept in a folder."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

import cskv
from benchmarks.quality.subjects import Texts
from cskv.cli.initial import BUDGET_SAMPLES
from cskv.compression.initialise import in_few_bits
from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source
from cskv.training.settings import TrainingSettings

CALIBRATION, SAMPLE_TOKENS = 24, 1024  # the command line's defaults
TRAINING_TOKENS = 512
BUDGETS = (0.2, 0.1, 0.05)
OWN, OTHER, BOTH = "own", "other", "both"


@dataclass(frozen=True)
class Recipe:
    """One way to make an adapter.

    Attributes:
        settings: of `CSKVConfig`.
        ratio: of a budget that ranks and widths are chosen by; None takes the settings' densities.
        ranks_only: the budget is spent on latents of 16 bits.
        training: gradient training that follows.
        bits: latents are put in so many bits at the end, without training on it.
        text: what it is made from: "own", "other" or "both".
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    ranks_only: bool = False
    training: TrainingSettings | None = None
    bits: int | None = None
    text: str = OWN

    def at(self, density: float) -> Recipe:
        """Return the recipe at a density of keys and values."""
        return replace(self, settings=dict(self.settings) | {"k_density": density, "v_density": density})

    @property
    def config(self) -> cskv.CSKVConfig:
        """The settings, otherwise the defaults."""
        return cskv.CSKVConfig(**self.settings)

    @property
    def key(self) -> str:
        """A name for files, of everything that it says."""
        said = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:12]


class Workshop:
    """Makes a model's adapters from the text of one seed.

    Args:
        model: bare.
        tokenizer: its own.
        folder: for statistics, adapters and checkpoints.
        seed: every one has other calibration and training text.
        texts: where that comes from.
        training: samples of gradient training.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path, seed: int, texts: Texts, training: int) -> None:
        self.model, self.tokenizer, self.folder, self.seed = model, tokenizer, folder, seed
        self._sources = {OWN: texts.calibration, OTHER: texts.other, BOTH: f"{texts.calibration}+{texts.other}"}
        self._training = training
        self.statistics = functools.cache(self._statistics)

    def adapter(self, recipe: Recipe) -> cskv.CSKVAdapter:
        """Return a recipe's adapter, made if it is not in the folder."""
        path = self._path(recipe)
        if not (path / "config.json").exists():  # a folder is whole or absent
            if recipe.training is not None or recipe.bits is not None:
                self._changed(recipe).save_pretrained(path)
            elif recipe.ratio is not None:
                self._spend(recipe)
            else:
                cskv.initialise(self.model, recipe.config, self.statistics(recipe.text)).save_pretrained(path)
        return cskv.CSKVAdapter.from_pretrained(path)

    def _path(self, recipe: Recipe) -> Path:
        return self.folder / recipe.key

    def _spend(self, recipe: Recipe) -> None:
        """Spend a budget, and the other usual ones with it, since that costs little more."""
        assert recipe.ratio is not None
        ratios = BUDGETS if recipe.ratio in BUDGETS else (recipe.ratio,)
        samples = self._samples(recipe.text, BUDGET_SAMPLES, SAMPLE_TOKENS, after=CALIBRATION)
        budgets = [cskv.Budget(ratio) for ratio in ratios]
        given = self.model, recipe.config, self.statistics(recipe.text), samples, budgets
        for ratio, found in zip(ratios, cskv.allocate_each(*given, ranks_only=recipe.ranks_only), strict=True):
            found.adapter.metrics |= {"predicted_kl": found.predicted_kl, "measured_kl": found.measured_kl}
            found.adapter.save_pretrained(self._path(replace(recipe, ratio=ratio)))

    def _changed(self, recipe: Recipe) -> cskv.CSKVAdapter:
        """Return an adapter after what follows its making: few bits, or before that training."""
        if recipe.bits is not None:
            adapter = self.adapter(replace(recipe, bits=None))
            config = replace(adapter.config, k_bits=recipe.bits, v_bits=recipe.bits)
            return in_few_bits(adapter, config, self.statistics(recipe.text))
        adapter = self.adapter(replace(recipe, training=None))
        path, samples = self._path(recipe), self._samples(recipe.text, self._training, TRAINING_TOKENS)
        cskv.train(self.model, adapter, samples, recipe.training, output=path.with_name(f"{path.name}-training"))
        return adapter

    def _statistics(self, text: str) -> cskv.Statistics:
        path = self.folder / f"statistics-{text}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = self._samples(text, CALIBRATION, SAMPLE_TOKENS)
            kept = path.with_name(f"{path.name}.unfinished")
            cskv.calibrate(self.model, samples, source=text, seed=self.seed, kept=kept).save(path)
        return cskv.Statistics.load(path)

    def _samples(self, text: str, count: int, tokens: int, *, after: int = 0) -> list[Tensor]:
        """Return samples of a text after others; a running text has another stretch for every seed."""
        source = open_source(self._sources[text])
        start = after if source.separate else after + self.seed * (CALIBRATION + BUDGET_SAMPLES)
        samples = TokenSamples(source, self.tokenizer, start + count, tokens, self.seed)
        return list(islice(samples.starting_at(start), count))

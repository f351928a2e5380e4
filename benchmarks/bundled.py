"""Adapters of the bundled model by recipes, and the quality of caches: for `closed_form`, `quantised` and `grids`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any

import typer
from common import MODEL, RESULTS, Jobs, Row, measure_missing, read_results
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

import cskv
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.budget import Budget, allocate
from cskv.compression.initialise import initialise
from cskv.data.lines import make_case
from cskv.data.mixed import mixed_source
from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source
from cskv.evaluation.perplexity import perplexity, token_sequences
from cskv.evaluation.reconstruction import reconstruction_losses
from cskv.evaluation.tasks import evaluate_cases
from cskv.models.survey import survey
from cskv.reading.divergence import Divergence
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train

NUM_LINES, SAMPLE_LEN = 200, 1024
CALIBRATION_SAMPLES, ALLOCATION_SAMPLES = 32, 8
SEEDS = (0, 1)
CASES, BATCH = 50, 5
TEXTS, TEXT_TOKENS = 12, 1024


@dataclass(frozen=True)
class Recipe:
    """One way to make an adapter."""

    settings: dict[str, Any] = field(default_factory=dict)  # of `CSKVConfig`, besides window and group
    allocated: bool = False  # ranks are dealt out over all projections within the density
    ratio: float | None = None  # the byte budget of mixed widths
    training: TrainingSettings | None = None  # gradient training that follows
    samples: int = 0  # of training text
    calibration: int = CALIBRATION_SAMPLES  # samples of calibration text

    @property
    def config(self) -> cskv.CSKVConfig:
        return cskv.CSKVConfig(**({"window": 32, "group": 32, "sinks": 0} | self.settings))

    def at(self, density: float) -> Recipe:
        """Return the recipe at a density of keys and values."""
        return replace(self, settings=self.settings | {"k_density": density, "v_density": density})


def load(**options: Any) -> Any:
    """Return the bundled model."""
    return AutoModelForCausalLM.from_pretrained(MODEL, **options).eval()


class Maker:
    """Makes adapters of a bare model from the text of one seed. What several recipes need is made once."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, AutoTokenizer.from_pretrained(MODEL), seed
        self.calibrated = cache(self._calibrated)
        self._mixed = cache(self._in_mixed_widths)

    def samples(self, count: int) -> TokenSamples:
        """Return samples of offline text and LongEval records, half and half."""
        return TokenSamples(mixed_source(NUM_LINES), self.tokenizer, count, SAMPLE_LEN, self.seed)

    def statistics(self, count: int) -> Statistics:
        """Return the statistics of so many samples."""
        return self.calibrated(count)[0]

    def make(self, recipe: Recipe) -> cskv.CSKVAdapter:
        """Make an adapter."""
        adapter = self._untrained(recipe)
        if recipe.training is not None:
            train(self.model, adapter, self.samples(recipe.samples), recipe.training)
        return adapter

    def _untrained(self, recipe: Recipe) -> cskv.CSKVAdapter:
        config = recipe.config
        if recipe.ratio is not None:
            return copy.deepcopy(self._mixed(config, recipe.ratio, recipe.calibration))
        statistics = self.statistics(recipe.calibration)
        if not recipe.allocated:
            return initialise(self.model, config, statistics)
        samples = list(self.samples(ALLOCATION_SAMPLES))
        budget = Budget(config.k_density)
        return allocate(self.model, config, statistics, samples, budget, ranks_only=True).adapter

    def _in_mixed_widths(self, config: cskv.CSKVConfig, ratio: float, calibration: int) -> cskv.CSKVAdapter:
        samples = list(self.samples(ALLOCATION_SAMPLES))
        return allocate(self.model, config, self.statistics(calibration), samples, Budget(ratio)).adapter

    def _calibrated(self, count: int) -> tuple[Statistics, float]:
        """Calibrate, and return the seconds that it took as well."""
        began = time.perf_counter()
        config = cskv.CSKVConfig(sinks=0)
        return calibrate(self.model, self.samples(count), config), time.perf_counter() - began


class Bench(Maker):
    """The model and the material of one seed, which picks the text and the questions."""

    def __init__(self, model: Any, seed: int, texts: int = TEXTS) -> None:
        super().__init__(model, seed)
        self.surveyed = survey(model)
        self.divergence = Divergence(self.surveyed)
        self.held_out = self.tokens(open_source("offline", "heldout").read(seed), TEXT_TOKENS, texts)
        self.cases = [make_case(NUM_LINES, 1000 * seed + index).as_case() for index in range(CASES)]

    def tokens(self, texts: Iterable[str], length: int, count: int) -> Tensor:
        """Return (count, length) token ids, the heads of the texts that are long enough."""
        return token_sequences(self.tokenizer, texts, length, count)

    def losses(self, adapter: cskv.CSKVAdapter) -> dict[str, list[float]]:
        """Return the reconstruction losses of held-out keys and values, by layer."""
        found = reconstruction_losses(self.model, adapter, self.held_out)
        return {"k": [loss.k for loss in found], "v": [loss.v for loss in found]}

    def through_cache(self, adapter: cskv.CSKVAdapter | None, new_cache: Callable[[], Cache] | None = None) -> Row:
        """Measure perplexity and LongEval accuracy through a compressed cache, another one, or the model's own."""
        with nullcontext() if adapter is None else cskv.attach(self.model, adapter):
            text = perplexity(self.model, self.held_out, chunk=32, first_chunk=64, batch_size=4, new_cache=new_cache)
            lines = evaluate_cases(
                self.model, self.tokenizer, self.cases, batch_size=BATCH, max_new_tokens=16, new_cache=new_cache
            )
        figures = {"accuracy": lines.score, "low": lines.low, "high": lines.high, "cases": lines.n}
        return figures | {"perplexity": text.ppl}


def start(script: str, jobs: Callable[[], Jobs], write_report: Callable[[dict[str, Any]], None]) -> None:
    """Run a script: measure what its results lack, and write its report. `jobs` loads models."""

    def main(report: Annotated[bool, typer.Option("--report", help="Only write the report again.")] = False) -> None:
        """Measure what is missing, then write the tables and figures of the documentation."""
        path = RESULTS / f"{script}.json"
        results = read_results(path)
        if not report:
            measure_missing(path, results, jobs())
        write_report(results)

    typer.run(main)

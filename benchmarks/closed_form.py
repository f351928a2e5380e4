"""Closed-form factors against trained ones on the bundled model, at 50 to 90 % of the channels removed, two seeds.

    python benchmarks/closed_form.py            # measures what is missing in results/closed_form.json, then reports
    python benchmarks/closed_form.py --report   # only writes the tables and figures again

The seed picks the calibration and training text and the questions. Every row is one adapter: its reconstruction loss on
held-out text layer by layer, the divergence and perplexity of held-out text as the compressed cache reads it, and
LongEval-lines accuracy through `generate`. Rows that are there already are not measured again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

# Threads that spin while they wait halve the speed of whatever else runs on the machine; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from common import measure_missing, read_results

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.attach import attach
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.budget import allocate_ranks
from cskv.compression.divergence import Divergence
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.data.lines import make_case
from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source
from cskv.demo.text import mixed_source
from cskv.evaluation.longeval import evaluate_lines
from cskv.evaluation.perplexity import perplexity, token_sequences
from cskv.evaluation.reconstruction import reconstruction_losses
from cskv.models.survey import survey
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tinymodel" / "checkpoint"
RESULTS = HERE / "results" / "closed_form.json"
DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1)
SEEDS = (0, 1)
UNCOMPRESSED = "uncompressed"
NUM_LINES, CASES, BATCH = 200, 50, 5
SAMPLE_LEN, CALIBRATION_SAMPLES = 1024, 32
TEXTS, TEXT_TOKENS = 12, 1024
PAPER = TrainingSettings()  # AdamW at 5e-5, batch 1, one epoch
PAPER_SAMPLES = 1264
TUNED = TrainingSettings(learning_rate=2e-3, warmup_steps=20, schedule="cosine", batch_size=2)
DISTILLED = TrainingSettings(objective="distillation", learning_rate=1e-3, warmup_steps=10, schedule="cosine")
DISTILLATION_SAMPLES = 128


@dataclass(frozen=True)
class Method:
    """One way to get factors.

    Attributes:
        settings: of `CSKVConfig`, besides densities and window.
        training, samples: gradient training that follows, and on how many samples.
        allocated: whether ranks are dealt out by sensitivity.
        calibration: samples of calibration text.
        densities: where it is measured.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    training: TrainingSettings | None = None
    samples: int = 0
    allocated: bool = False
    calibration: int = CALIBRATION_SAMPLES
    densities: tuple[float, ...] = DENSITIES


METHODS = (
    Method("SVD", {"init": "svd"}),
    Method("ASVD", {"init": "asvd"}),
    Method("trained, paper's recipe", {"init": "asvd"}, PAPER, PAPER_SAMPLES, densities=(0.5, 0.2)),
    Method("trained, lr 2e-3", {"init": "asvd"}, TUNED, 800, densities=(0.5, 0.2, 0.1)),
    Method("PCA", {"init": "pca"}),
    Method("PCA, 16 samples", {"init": "pca"}, calibration=16, densities=(0.5, 0.2)),
    Method("PCA, 800 samples", {"init": "pca"}, calibration=800, densities=(0.5, 0.2, 0.1)),
    Method("weighted PCA", {"init": "weighted-pca"}),
    Method("PCA, allocated ranks", {"init": "pca"}, allocated=True),
    Method("weighted PCA, allocated ranks", {"init": "weighted-pca"}, allocated=True),
    Method("PCA, 2 head groups", {"init": "pca", "head_groups": 2}),
    Method("commuting keys", {"init": "pca", "key_factors": "commuting"}),
    Method("weighted commuting keys", {"init": "weighted-pca", "key_factors": "commuting"}),
    Method("PCA, distilled", {"init": "pca"}, DISTILLED, DISTILLATION_SAMPLES, densities=(0.2, 0.1)),
)


class Bench:
    """The model and the material of one seed.

    Args:
        seed: of calibration text and questions.
    """

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.divergence = Divergence(survey(model))
        self.held_out = token_sequences(tokenizer, open_source("offline", "heldout").read(seed), TEXT_TOKENS, TEXTS)
        self.cases = [make_case(NUM_LINES, 1000 * seed + i) for i in range(CASES)]
        self._statistics: dict[int, tuple[Statistics, float]] = {}

    def statistics(self, samples: int) -> tuple[Statistics, float]:
        """Calibration on so many samples, and the seconds that it took."""
        if samples not in self._statistics:
            began = time.perf_counter()
            statistics = calibrate(self.model, self.samples(samples))
            self._statistics[samples] = statistics, time.perf_counter() - began
        return self._statistics[samples]

    def samples(self, number: int) -> TokenSamples:
        """Mixed text of the seed."""
        return TokenSamples(mixed_source(NUM_LINES), self.tokenizer, number, SAMPLE_LEN, self.seed)

    def make(self, method: Method, density: float) -> tuple[CSKVAdapter, float]:
        """The adapter, and the seconds that it took beyond calibration."""
        config = CSKVConfig(density, density, window=32, group=32, **method.settings)
        statistics, _ = self.statistics(method.calibration)
        began = time.perf_counter()
        if method.allocated:
            samples = list(self.samples(8))
            adapter = allocate_ranks(self.model, config, statistics, samples, density).adapter
        else:
            adapter = initialise(self.model, config, statistics)
        if method.training is not None:
            train(self.model, adapter, self.samples(method.samples), method.training)
        return adapter, time.perf_counter() - began

    def measure(self, adapter: CSKVAdapter | None) -> dict[str, Any]:
        """The figures of one adapter; None is the uncompressed model."""
        figures: dict[str, Any] = {}
        if adapter is not None:
            figures["divergence"] = self.divergence.mean(adapter, self.held_out)
            losses = reconstruction_losses(self.model, adapter, self.held_out)
            figures["losses"] = {"k": [loss.k for loss in losses], "v": [loss.v for loss in losses]}
        scope = attach(self.model, adapter) if adapter is not None else None
        try:
            text = perplexity(self.model, self.held_out, chunk=32, first_chunk=64, batch_size=4)
            lines = evaluate_lines(self.model, self.tokenizer, self.cases, batch_size=BATCH, max_new_tokens=16)
        finally:
            if scope is not None:
                scope.detach()
        return figures | {
            "perplexity": text.ppl,
            "accuracy": lines.accuracy,
            "low": lines.low,
            "high": lines.high,
            "cases": lines.n,
        }


class Benches:
    """The model, loaded once, and the material of each seed, made when it is first asked for."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.of = cache(lambda seed: Bench(self._model, self._tokenizer, seed))


def jobs(benches: Benches) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of a row -> how it is measured: 80 % first, and training last, so that an interrupted run says the most."""
    order = sorted(METHODS, key=lambda method: method.samples)
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in SEEDS:
        found[f"{seed}/{UNCOMPRESSED}"] = lambda s=seed: (
            {"seed": s, "method": UNCOMPRESSED} | benches.of(s).measure(None)
        )
        for density in (0.2, 0.1, 0.5, 0.4, 0.3):
            for method in order:
                if density in method.densities:
                    found[f"{seed}/{method.name}/{density:g}"] = partial(_row, benches, seed, method, density)
    return found


def _row(benches: Benches, seed: int, method: Method, density: float) -> dict[str, Any]:
    bench = benches.of(seed)
    adapter, seconds = bench.make(method, density)
    return {
        "seed": seed,
        "method": method.name,
        "density": density,
        "seconds": seconds,
        "calibration_seconds": bench.statistics(method.calibration)[1],
        "ranks": [[adapter.factors(i).k.rank, adapter.factors(i).v.rank] for i in adapter.layer_indices],
    } | bench.measure(adapter)


def main(report: Annotated[bool, typer.Option("--report", help="Only write the report again.")] = False) -> None:
    """Measure what is missing, then write the tables and figures of docs/closed-form.md."""
    from closed_form_report import write_report

    results = read_results(RESULTS)
    if not report:
        measure_missing(RESULTS, results, jobs(Benches()))
    write_report(results, [method.name for method in METHODS], list(DENSITIES))


if __name__ == "__main__":
    typer.run(main)

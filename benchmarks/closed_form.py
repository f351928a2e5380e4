"""Closed-form factors against trained ones on the bundled model, at 50 to 90 % of the channels removed, two seeds.

    python benchmarks/closed_form.py            # measures what is missing in results/closed_form.json, then reports
    python benchmarks/closed_form.py --report   # only writes the tables and figures again

The seed picks the calibration and training text and the questions. Every row is one adapter: its reconstruction loss on
held-out text layer by layer, the divergence and perplexity of held-out text as the compressed cache reads it, and
LongEval-lines accuracy through `generate`. Rows that are there already are not measured again.
"""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Annotated

import typer
from adapters import Recipe
from common import RESULTS, Jobs, Row
from quality import SEEDS, Bench, load, measure

from cskv.training.settings import TrainingSettings

DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1)
UNCOMPRESSED = "uncompressed"
PAPER = TrainingSettings()  # AdamW at 5e-5, batch 1, one epoch
TUNED = TrainingSettings(learning_rate=2e-3, warmup_steps=20, schedule="cosine", batch_size=2)
DISTILLED = TrainingSettings(objective="distillation", learning_rate=1e-3, warmup_steps=10, schedule="cosine")
PCA, WEIGHTED = {"init": "pca"}, {"init": "weighted-pca"}
COMMUTING = {"key_factors": "commuting"}
METHODS: dict[str, tuple[Recipe, tuple[float, ...]]] = {
    "SVD": (Recipe({"init": "svd"}), DENSITIES),
    "ASVD": (Recipe({"init": "asvd"}), DENSITIES),
    "trained, paper's recipe": (Recipe({"init": "asvd"}, training=PAPER, samples=1264), (0.5, 0.2)),
    "trained, lr 2e-3": (Recipe({"init": "asvd"}, training=TUNED, samples=800), (0.5, 0.2, 0.1)),
    "PCA": (Recipe(PCA), DENSITIES),
    "PCA, 16 samples": (Recipe(PCA, calibration=16), (0.5, 0.2)),
    "PCA, 800 samples": (Recipe(PCA, calibration=800), (0.5, 0.2, 0.1)),
    "weighted PCA": (Recipe(WEIGHTED), DENSITIES),
    "PCA, allocated ranks": (Recipe(PCA, allocated=True), DENSITIES),
    "weighted PCA, allocated ranks": (Recipe(WEIGHTED, allocated=True), DENSITIES),
    "PCA, 2 head groups": (Recipe(PCA | {"head_groups": 2}), DENSITIES),
    "commuting keys": (Recipe(PCA | COMMUTING), DENSITIES),
    "weighted commuting keys": (Recipe(WEIGHTED | COMMUTING), DENSITIES),
    "PCA, distilled": (Recipe(PCA, training=DISTILLED, samples=128), (0.2, 0.1)),
}


def jobs() -> Jobs:
    """Name of a row -> how it is measured: 80 % first, and training last, so that an interrupted run says the most."""
    bench = cache(partial(Bench, load()))
    order = sorted(METHODS, key=lambda name: METHODS[name][0].samples)
    found: dict[str, partial[Row]] = {}
    for seed in SEEDS:
        found[f"{seed}/{UNCOMPRESSED}"] = partial(_uncompressed, bench, seed)
        for density in (0.2, 0.1, 0.5, 0.4, 0.3):
            for name in order:
                if density in METHODS[name][1]:
                    found[f"{seed}/{name}/{density:g}"] = partial(_row, bench, seed, name, density)
    return found


def _uncompressed(bench: partial[Bench], seed: int) -> Row:
    return {"seed": seed, "method": UNCOMPRESSED} | bench(seed).through_cache(None)


def _row(benches: partial[Bench], seed: int, name: str, density: float) -> Row:
    bench, recipe = benches(seed), METHODS[name][0]
    calibration_seconds = bench.calibrated(recipe.calibration)[1]
    began = time.perf_counter()
    adapter = bench.make(recipe.at(density))
    return {
        "seed": seed,
        "method": name,
        "density": density,
        "seconds": time.perf_counter() - began,
        "calibration_seconds": calibration_seconds,
        "ranks": [[adapter.factors(i).k.rank, adapter.factors(i).v.rank] for i in adapter.layer_indices],
        "divergence": bench.divergence.mean(adapter, bench.held_out),
        "losses": bench.losses(adapter),
    } | bench.through_cache(adapter)


def main(report: Annotated[bool, typer.Option("--report", help="Only write the report again.")] = False) -> None:
    """Measure what is missing, then write the tables and figures of docs/closed-form.md."""
    from closed_form_report import write_report

    write_report(measure(RESULTS / "closed_form.json", report, jobs), list(METHODS), DENSITIES)


if __name__ == "__main__":
    typer.run(main)

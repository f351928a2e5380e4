"""Few-bit latents against post-training quantisation and transformers' quantised cache, on the bundled model.

    pip install -e '.[peers]'             # hqq and optimum-quanto, for the rows to compare with
    python benchmarks/quantised.py        # measures what is missing in results/quantised.json, then writes the tables
    python benchmarks/quantised.py --report

Every row is one cache: LongEval-lines accuracy through `generate`, perplexity of held-out text as the cache is read,
and the bytes that are allocated after a prompt of 1920 tokens in bfloat16. Two seeds pick the text and the
questions.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import cache, partial
from typing import Annotated, Any

import typer
from adapters import Recipe
from common import RESULTS, Jobs, Row
from quality import SEEDS, Bench, load, measure

import cskv
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.methods.quantized import quantized_cache
from cskv.training.settings import TrainingSettings

QAT = TrainingSettings(learning_rate=1e-3, warmup_steps=10, schedule="cosine", batch_size=2)
DISTILLED = TrainingSettings(objective="distillation", learning_rate=3e-4, warmup_steps=5, schedule="cosine")
# What follows the initialisation: nothing, reconstruction, or distillation, both through the grid.
TRAINING: dict[str, dict[str, Any]] = {
    "post-training": {},
    "QAT": {"training": QAT, "samples": 400},
    "QAT end to end": {"training": DISTILLED, "samples": 96},
}
MIXED = {"init": "weighted-pca", "mixed_widths": True}
SMALL = {"k_density": 0.1406, "v_density": 0.125, "init": "pca", "k_bits": 4, "v_bits": 4}  # the bytes of 4.4 %
PEERS = {f"QuantizedCache {backend}, {bits} bits": (backend, bits) for backend in ("hqq", "quanto") for bits in (4, 2)}


def _uniform(bits: int) -> dict[str, Any]:
    return {"k_density": 0.2, "v_density": 0.2, "init": "pca", "k_bits": bits, "v_bits": bits}


RECIPES = {
    "20 % of the channels, 16 bits": Recipe(_uniform(16)),
    **{f"20 % x 4 bits, {name}": Recipe(_uniform(4), **how) for name, how in TRAINING.items()},
    **{f"20 % x 2 bits, {name}": Recipe(_uniform(2), **how) for name, how in TRAINING.items()},
    **{f"13 % x 4 bits, {name}": Recipe(SMALL, **TRAINING[name]) for name in ("post-training", "QAT end to end")},
    **{f"mixed widths 4.4 %, {name}": Recipe(MIXED, ratio=0.044, **how) for name, how in TRAINING.items()},
    **{f"mixed widths {100 * r:g} %, post-training": Recipe(MIXED, ratio=r) for r in (0.064, 0.12, 0.24)},
}
NAMES = ("uncompressed", *PEERS, *RECIPES)


def jobs() -> Jobs:
    """Name of a row -> how it is measured."""
    bench, half = cache(partial(Bench, load(dtype="float32"))), load(dtype="bfloat16")
    return {f"{seed}/{name}": partial(_row, bench, half, seed, name) for seed in SEEDS for name in NAMES}


def _row(benches: partial[Bench], half: Any, seed: int, name: str) -> Row:
    bench, began = benches(seed), time.perf_counter()
    adapter = bench.make(RECIPES[name]) if name in RECIPES else None
    row: Row = {"seed": seed, "name": name, "seconds": time.perf_counter() - began}
    caches: list[Any] = [None, None]
    if name in PEERS:
        backend, bits = PEERS[name]
        caches = [partial(quantized_cache, model, backend, nbits=bits) for model in (bench.model, half)]
    if adapter is not None:
        row["kl"] = bench.divergence.mean(adapter, bench.held_out)
        row["loss"] = {kind: sum(losses) for kind, losses in bench.losses(adapter).items()}
        if adapter.config.is_quantised:
            row["bits"] = [[grid.bits_per_latent for grid in adapter.grids(i)] for i in adapter.layer_indices]
    row |= bench.through_cache(adapter, caches[0])
    prompt = bench.tokenizer(bench.cases[0].prompt, return_tensors="pt").input_ids
    with nullcontext() if adapter is None else cskv.attach(half, adapter):
        size = cache_after_prefill(half, prompt, new_cache=caches[1])
    return row | {"cache": size.to_dict()}


def main(report: Annotated[bool, typer.Option("--report", help="Only write the tables again.")] = False) -> None:
    """Measure what is missing, then write the table and the figure of docs/quantisation.md."""
    from quantised_report import write_report

    write_report(measure(RESULTS / "quantised.json", report, jobs), NAMES)


if __name__ == "__main__":
    typer.run(main)

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
from statistics import mean
from typing import Any

from bundled import SEEDS, Bench, Recipe, load, start
from common import Jobs, Row
from pages import DOCS, Table, accuracy, draw_pair, fill_page, measured_on

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
MIXED = {"init": "fisher-pca"}
SMALL = {"k_density": 0.1406, "v_density": 0.125, "init": "pca", "k_bits": 4, "v_bits": 4}  # the bytes of 4.4 %
PEERS = {f"QuantizedCache {backend}, {bits} bits": (backend, bits) for backend in ("hqq", "quanto") for bits in (4, 2)}
# In the figure, by how a name begins; one width otherwise.
SERIES = {
    "uncompressed": "uncompressed",
    "QuantizedCache": "transformers' QuantizedCache",
    "mixed": "cskv, mixed widths",
}
PARTS = {  # of the bytes
    "latents": ("payload",),
    "scales, minima": ("scale", "minimum"),
    "window": ("window",),
    "slack, positions": ("slack", "position"),
}
Found = dict[str, list[Row]]


def _uniform(bits: int) -> dict[str, Any]:
    return {"k_density": 0.2, "v_density": 0.2, "init": "pca", "k_bits": bits, "v_bits": bits}


RECIPES = {
    "20 % of the channels, 16 bits": Recipe(_uniform(16)),
    **{f"20 % x 4 bits, {name}": Recipe(_uniform(4), **how) for name, how in TRAINING.items()},
    **{f"20 % x 2 bits, {name}": Recipe(_uniform(2), **how) for name, how in TRAINING.items()},
    **{f"13 % x 4 bits, {name}": Recipe(SMALL, **TRAINING[name]) for name in ("post-training", "QAT end to end")},
    **{f"mixed widths {100 * r:g} %, post-training": Recipe(MIXED, ratio=r) for r in (0.044, 0.064, 0.12, 0.24)},
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


def write_report(results: dict[str, Any]) -> None:
    """Put the tables between the page's markers, and draw the figure."""
    rows = list(results["rows"].values())
    by_name = {name: [row for row in rows if row["name"] == name] for name in NAMES}
    found = {name: own for name, own in by_name.items() if own}
    tables = (table.markdown() for table in (_table(found), _losses(found)))
    fill_page(DOCS / "quantisation.md", "quantised", measured_on(results["environment"], "quantised", rows), *tables)
    _draw(found)


def _table(found: Found) -> Table:
    cells = []
    for name, own in found.items():
        caches = [row["cache"] for row in own]
        shares = [
            mean(sum(cache[f"{part}_bytes"] for part in parts) / cache["uncompressed_bytes"] for cache in caches)
            for parts in PARTS.values()
        ]
        parts = [f"{share:.1%}" if shares[0] else "" for share in shares]
        ratio = mean(cache["ratio"] for cache in caches)
        kl = f"{mean(row['kl'] for row in own):.4f}" if "kl" in own[0] else ""
        cells.append([name, f"{ratio:.1%}", *parts, accuracy(own), f"{mean(row['perplexity'] for row in own):.2f}", kl])
    return Table("", ("cache", "bytes of bf16", *PARTS, "LongEval % right (95 %)", "perplexity", "KL"), cells)


def _losses(found: Found) -> Table:
    """Make the table of reconstruction losses, summed over layers, before and after training through the grid."""
    cells = []
    for name, own in found.items():
        if name.startswith("20 %") and all("loss" in row for row in own):
            cells.append([name, *(f"{mean(row['loss'][kind] for row in own):.4f}" for kind in ("k", "v"))])
    return Table("", ("reconstruction loss of held-out text", "keys", "values"), cells)


def _draw(found: Found) -> None:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for name, own in found.items():
        kind = next((title for start, title in SERIES.items() if name.startswith(start)), "cskv, one width")
        right, text = (mean(row[of] for row in own) for of in ("accuracy", "perplexity"))
        series.setdefault(kind, []).append((100 * mean(row["cache"]["ratio"] for row in own), 100 * right, text))
    label, ticks = "bytes, % of the bf16 cache (1920-token prompt)", (5, 10, 20, 50, 100)
    path = DOCS / "figures" / "quantised.png"
    draw_pair(path, series, label, {"ylabel": "perplexity of held-out text"}, ticks=ticks)


if __name__ == "__main__":
    start("quantised", jobs, write_report)

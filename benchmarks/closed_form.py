"""Closed-form factors against trained ones on the bundled model, at 50 to 90 % of the channels removed, two seeds.

    python benchmarks/closed_form.py            # measures what is missing in results/closed_form.json, then reports
    python benchmarks/closed_form.py --report   # only writes the tables and figures again

The seed picks the calibration and training text and the questions. Every row is one adapter: its reconstruction loss on
held-out text layer by layer, the divergence and perplexity of held-out text as the compressed cache reads it, and
LongEval-lines accuracy through `generate`. Rows that are there already are not measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from statistics import mean
from typing import Any

from bundled import SEEDS, Bench, Recipe, load, start
from common import Jobs, Row
from pages import DOCS, Table, accuracy, draw_pair, fill_page, measured_on

from cskv.plots import plot_losses, plot_ranks
from cskv.training.settings import TrainingSettings

FIGURES = DOCS / "figures"
DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1)
UNCOMPRESSED = "uncompressed"
PAPER = TrainingSettings()  # AdamW at 5e-5, batch 1, one epoch
TUNED = TrainingSettings(learning_rate=2e-3, warmup_steps=20, schedule="cosine", batch_size=2)
DISTILLED = TrainingSettings(objective="distillation", learning_rate=1e-3, warmup_steps=10, schedule="cosine")
PCA, WEIGHTED, FISHER = {"init": "pca"}, {"init": "weighted-pca"}, {"init": "fisher-pca"}
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
    "Fisher PCA": (Recipe(FISHER), (0.5, 0.2, 0.1)),
    "Fisher PCA, allocated ranks": (Recipe(FISHER, allocated=True), (0.5, 0.2, 0.1)),
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


def write_report(results: dict[str, Any]) -> None:
    """Put the tables between the page's markers, and draw its figures."""
    rows = [row for row in results["rows"].values() if "density" in row]
    full = [row for row in results["rows"].values() if "density" not in row]
    tables = (
        _table(rows, "LongEval lines, % right (95 % interval)", accuracy, accuracy(full)),
        _table(rows, "Perplexity of held-out text", _perplexity, _perplexity(full)),
        _table(rows, "KL from the uncompressed model, nats per token", _divergence, "0"),
        _losses_table(rows),
    )
    where = measured_on(results["environment"], "closed_form", rows)
    fill_page(DOCS / "closed-form.md", "closed_form", where, *tables, _verdicts(rows))
    _draw(rows)


def _pick(rows: list[Row], method: str, density: float = 0.2) -> list[Row]:
    return [row for row in rows if row["method"] == method and row["density"] == density]


def _measured(rows: list[Row], density: float) -> dict[str, list[Row]]:
    """Return the rows of every method that has some."""
    return {method: found for method in METHODS if (found := _pick(rows, method, density))}


def _mean(rows: Sequence[Row], name: str) -> float:
    return mean(row[name] for row in rows)


def _perplexity(rows: Sequence[Row]) -> str:
    return f"{_mean(rows, 'perplexity'):.2f}"


def _divergence(rows: Sequence[Row]) -> str:
    return f"{_mean(rows, 'divergence'):.4f}"


def _table(rows: list[Row], title: str, show: Callable[[Sequence[Row]], str], full: str) -> str:
    columns = [_measured(rows, density) for density in DENSITIES]
    methods = [method for method in METHODS if any(method in column for column in columns)]
    cells = [[m, *(show(column[m]) if m in column else "" for column in columns)] for m in methods]
    headings = ("channels removed", *(f"{100 * (1 - d):.0f} %" for d in DENSITIES))
    return f"### {title}\n\nUncompressed: {full}\n\n{Table('', headings, cells).markdown()}"


def _losses_of(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return the losses of keys and of values layer by layer, means over seeds."""
    return {kind: [mean(own) for own in zip(*(row["losses"][kind] for row in rows))] for kind in ("k", "v")}


def _losses_table(rows: list[Row]) -> str:
    cells = []
    for method, found in _measured(rows, 0.2).items():
        losses = (f"{1000 * loss:.3g}" for own in _losses_of(found).values() for loss in own)
        cells.append([method, *losses, f"{_mean(found, 'seconds'):.2f}"])
    places = (f"{kind}{i}" for kind in ("K", "V") for i in range(len(rows[0]["ranks"])))
    return (
        "### Reconstruction loss on held-out text at 80 %, by layer\n\nMean squared error per channel, in thousandths; "
        f"seconds are beyond calibration.\n\n{Table('', ('method', *places, 'seconds'), cells).markdown()}"
    )


def _verdicts(rows: list[Row]) -> str:
    """Say what the figures say on the claims."""
    lines = ["### Checked", ""]
    rivals = [m for m in ("SVD", "ASVD", "trained, paper's recipe", "trained, lr 2e-3") if _pick(rows, m)]
    for name in ("PCA", "PCA, 16 samples", "PCA, 800 samples"):
        scores = [(rival, *_wins(rows, name, rival)) for rival in rivals]
        told = "; ".join(f"{rival}: {wins} of {total}" for rival, wins, total in scores if total)
        if told:
            lines.append(f'* Projections in which the held-out loss of "{name}" is below that of {told}.')
    trained = _pick(rows, "trained, paper's recipe")
    for name in ("PCA", "PCA, 16 samples"):
        pca = _pick(rows, name)
        if trained and pca:
            seconds = mean(row["seconds"] + row["calibration_seconds"] for row in pca)
            factor = _mean(trained, "seconds") / seconds
            lines.append(
                f'* "{name}", its calibration included, takes {seconds:.1f} s; the paper\'s recipe takes {factor:.0f} '
                "times as long."
            )
    return "\n".join(lines)


def _wins(rows: list[Row], name: str, rival: str) -> tuple[int, int]:
    """Count the projections in which one method loses less than another, and those in which both were measured."""
    wins = total = 0
    for theirs in (row for row in rows if row["method"] == rival):
        for ours in (r for r in _pick(rows, name, theirs["density"]) if r["seed"] == theirs["seed"]):
            pairs = [(a, b) for k in ("k", "v") for a, b in zip(ours["losses"][k], theirs["losses"][k], strict=True)]
            wins, total = wins + sum(a < b for a, b in pairs), total + len(pairs)
    return wins, total


def _draw(rows: list[Row]) -> None:
    series = {}
    for method in METHODS:
        found = {d: own for d in sorted(DENSITIES) if (own := _pick(rows, method, d))}
        if len(found) > 2 and "samples" not in method:
            figures = {d: (100 * _mean(own, "accuracy"), _mean(own, "divergence")) for d, own in found.items()}
            series[method] = [(100 * (1 - d), *pair) for d, pair in figures.items()]
    if series:  # otherwise there is nothing to connect yet
        right = {"ylabel": "KL from uncompressed, nats per token", "yscale": "log"}
        draw_pair(FIGURES / "closed-form-curves.png", series, "channels removed, %", right)
    for row in _pick(rows, "Fisher PCA, allocated ranks")[:1]:
        title = "Latents per layer, 20 % in all, of one budget"
        plot_ranks(dict(enumerate(map(tuple, row["ranks"]))), FIGURES / "closed-form-ranks.png", title)
    losses = {}
    for method, found in _measured(rows, 0.2).items():
        if not any(word in method for word in ("allocated", "distilled", "samples", "weighted commuting")):
            k, v = _losses_of(found).values()
            losses[method] = list(zip(range(len(k)), k, v, strict=True))
    title = "Reconstruction loss on held-out text, 80 % of the channels removed"
    plot_losses(losses, FIGURES / "closed-form-losses.png", title)


if __name__ == "__main__":
    start("closed_form", jobs, write_report)

"""Tables and figures of `closed_form.py`'s results, into docs/closed-form.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common import Row
from pages import DOCS, Table, accuracy, draw_pair, fill_page, measured_on

from cskv.plots import plot_losses, plot_ranks

FIGURES = DOCS / "figures"
Show = Callable[[Sequence[Row]], str]


def write_report(results: dict[str, Any], methods: Sequence[str], densities: Sequence[float]) -> None:
    """Put the tables between the page's markers, and draw its figures."""
    rows = [row for row in results["rows"].values() if "density" in row]
    full = [row for row in results["rows"].values() if "density" not in row]
    methods = [method for method in methods if any(row["method"] == method for row in rows)]
    shown: list[tuple[str, Show, str]] = [
        ("LongEval lines, % right (95 % interval)", accuracy, accuracy(full)),
        ("Perplexity of held-out text", _perplexity, _perplexity(full)),
        ("KL from the uncompressed model, nats per token", lambda own: f"{_mean(own, 'divergence'):.4f}", "0"),
    ]
    tables = [_table(rows, methods, densities, *table) for table in shown]
    where = measured_on(results["environment"], "closed_form", rows)
    fill_page(DOCS / "closed-form.md", "closed_form", where, *tables, _losses_table(rows, methods), _verdicts(rows))
    _draw_curves(rows, methods, FIGURES / "closed-form-curves.png")
    _draw_ranks(rows, FIGURES / "closed-form-ranks.png")
    _draw_losses(rows, methods, FIGURES / "closed-form-losses.png")


def _pick(rows: list[Row], method: str, density: float) -> list[Row]:
    return [row for row in rows if row["method"] == method and row["density"] == density]


def _mean(rows: Sequence[Row], name: str) -> float:
    return mean(row[name] for row in rows)


def _perplexity(rows: Sequence[Row]) -> str:
    return f"{_mean(rows, 'perplexity'):.2f}"


def _table(
    rows: list[Row], methods: Sequence[str], densities: Sequence[float], title: str, show: Show, full: str
) -> str:
    cells = [
        [method, *(show(found) if (found := _pick(rows, method, d)) else "" for d in densities)] for method in methods
    ]
    headings = ("channels removed", *(f"{100 * (1 - d):.0f} %" for d in densities))
    return f"### {title}\n\nUncompressed: {full}\n\n{Table('', headings, cells).markdown()}"


def _losses_table(rows: list[Row], methods: Sequence[str], density: float = 0.2) -> str:
    places = [(kind, i) for kind in ("k", "v") for i in range(len(rows[0]["ranks"]))]
    cells = []
    for method in methods:
        if found := _pick(rows, method, density):
            losses = (f"{1000 * mean(row['losses'][kind][i] for row in found):.3g}" for kind, i in places)
            cells.append([method, *losses, f"{_mean(found, 'seconds'):.2f}"])
    headings = ("method", *(f"{kind.upper()}{i}" for kind, i in places), "seconds")
    return (
        "### Reconstruction loss on held-out text at 80 %, by layer\n\nMean squared error per channel, in thousandths; "
        f"seconds are beyond calibration.\n\n{Table('', headings, cells).markdown()}"
    )


def _verdicts(rows: list[Row]) -> str:
    """Say what the figures say on the claims."""
    lines = ["### Checked", ""]
    rivals = [m for m in ("SVD", "ASVD", "trained, paper's recipe", "trained, lr 2e-3") if _pick(rows, m, 0.2)]
    for name in ("PCA", "PCA, 16 samples", "PCA, 800 samples"):
        scores = [(rival, *_wins(rows, name, rival)) for rival in rivals]
        told = "; ".join(f"{rival}: {wins} of {total}" for rival, wins, total in scores if total)
        if told:
            lines.append(f'* Projections in which the held-out loss of "{name}" is below that of {told}.')
    trained = _pick(rows, "trained, paper's recipe", 0.2)
    for name in ("PCA", "PCA, 16 samples"):
        pca = _pick(rows, name, 0.2)
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


def _draw_curves(rows: list[Row], methods: Sequence[str], path: Path) -> None:
    series = {}
    for method in methods:
        densities = sorted({row["density"] for row in rows if row["method"] == method})
        if len(densities) > 2 and "samples" not in method:
            found = [_pick(rows, method, density) for density in densities]
            series[method] = [
                (100 * (1 - d), 100 * _mean(own, "accuracy"), _mean(own, "divergence"))
                for d, own in zip(densities, found, strict=True)
            ]
    if series:  # otherwise there is nothing to connect yet
        right = {"ylabel": "KL from uncompressed, nats per token", "yscale": "log"}
        draw_pair(path, series, "channels removed, %", right)


def _draw_ranks(rows: list[Row], path: Path, method: str = "PCA, allocated ranks", density: float = 0.2) -> None:
    found = _pick(rows, method, density)
    if found:
        ranks = dict(enumerate(map(tuple, found[0]["ranks"])))
        plot_ranks(ranks, path, f"Latents per layer, {100 * density:.0f} % in all, by measured sensitivity")


def _draw_losses(rows: list[Row], methods: Sequence[str], path: Path, density: float = 0.2) -> None:
    losses = {}
    for method in methods:
        found = _pick(rows, method, density)
        if found and not any(word in method for word in ("allocated", "distilled", "samples", "weighted commuting")):
            k, v = ([mean(values) for values in zip(*(row["losses"][kind] for row in found))] for kind in ("k", "v"))
            losses[method] = list(zip(range(len(k)), k, v, strict=True))
    plot_losses(
        losses, path, f"Reconstruction loss on held-out text, {100 * (1 - density):.0f} % of the channels removed"
    )

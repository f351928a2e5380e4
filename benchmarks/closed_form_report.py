"""Tables and figures of `closed_form.py`'s results, into docs/closed-form.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from common import Row, accuracy, fill_page, measured_on

from cskv.files import write_atomically
from cskv.plots import COLOURS, MARKERS, STYLE, plot_losses, plot_ranks

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "closed-form.md"


def write_report(results: dict[str, Any], methods: Sequence[str], densities: Sequence[float]) -> None:
    """Put the tables between the page's markers, and draw its figures."""
    rows = [row for row in results["rows"].values() if "density" in row]
    full = [row for row in results["rows"].values() if "density" not in row]
    methods = [method for method in methods if any(row["method"] == method for row in rows)]
    text = "\n\n".join(
        [
            measured_on(results["environment"], "closed_form", rows),
            _table(
                rows,
                methods,
                densities,
                "LongEval lines, % right (95 % interval)",
                accuracy,
                accuracy(full),
            ),
            _table(rows, methods, densities, "Perplexity of held-out text", _perplexity, _perplexity(full)),
            _table(rows, methods, densities, "KL from the uncompressed model, nats per token", _divergence, "0"),
            _losses_table(rows, methods),
            _verdicts(rows),
        ]
    )
    fill_page(PAGE, "closed_form", text)
    with matplotlib.rc_context(STYLE):
        _draw_curves(rows, methods, DOCS / "figures" / "closed-form-curves.png")
    _draw_ranks(rows, DOCS / "figures" / "closed-form-ranks.png")
    _draw_losses(rows, methods, DOCS / "figures" / "closed-form-losses.png")


def _pick(rows: list[Row], method: str, density: float) -> list[Row]:
    return [row for row in rows if row["method"] == method and row["density"] == density]


def _perplexity(rows: Sequence[Row]) -> str:
    return f"{mean(row['perplexity'] for row in rows):.2f}"


def _divergence(rows: Sequence[Row]) -> str:
    return f"{mean(row['divergence'] for row in rows):.4f}"


def _table(
    rows: list[Row],
    methods: Sequence[str],
    densities: Sequence[float],
    title: str,
    show: Callable[[Sequence[Row]], str],
    full: str,
) -> str:
    lines = [f"### {title}", "", f"Uncompressed: {full}", ""]
    lines.append("| channels removed | " + " | ".join(f"{100 * (1 - d):.0f} %" for d in densities) + " |")
    lines.append("|---|" + "---|" * len(densities))
    for method in methods:
        cells = [show(found) if (found := _pick(rows, method, d)) else "" for d in densities]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _losses_table(rows: list[Row], methods: Sequence[str], density: float = 0.2) -> str:
    layers = len(rows[0]["ranks"])
    head = [f"{kind.upper()}{i}" for kind in ("k", "v") for i in range(layers)]
    lines = [
        "### Reconstruction loss on held-out text at 80 %, by layer",
        "",
        "Mean squared error per channel, in thousandths; seconds are beyond calibration.",
        "",
        "| method | " + " | ".join(head) + " | seconds |",
        "|---|" + "---|" * (len(head) + 1),
    ]
    for method in methods:
        found = _pick(rows, method, density)
        if found:
            cells = [f"{1000 * mean(r['losses'][k][i] for r in found):.3g}" for k in ("k", "v") for i in range(layers)]
            lines.append(f"| {method} | " + " | ".join(cells) + f" | {mean(r['seconds'] for r in found):.2f} |")
    return "\n".join(lines)


def _verdicts(rows: list[Row]) -> str:
    """What the figures say on the claims, computed from them."""
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
            factor = mean(row["seconds"] for row in trained) / seconds
            lines.append(
                f'* "{name}", its calibration included, takes {seconds:.1f} s; the paper\'s recipe takes {factor:.0f} '
                "times as long."
            )
    return "\n".join(lines)


def _wins(rows: list[Row], name: str, rival: str) -> tuple[int, int]:
    """In how many projections one method loses less than another, and of how many, where both were measured."""
    wins = total = 0
    for theirs in (row for row in rows if row["method"] == rival):
        for ours in (r for r in _pick(rows, name, theirs["density"]) if r["seed"] == theirs["seed"]):
            pairs = [(a, b) for k in ("k", "v") for a, b in zip(ours["losses"][k], theirs["losses"][k], strict=True)]
            wins, total = wins + sum(a < b for a, b in pairs), total + len(pairs)
    return wins, total


def _draw_curves(rows: list[Row], methods: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = [
        m for m in methods if len({row["density"] for row in rows if row["method"] == m}) > 2 and "samples" not in m
    ]
    if not shown:  # nothing to connect yet
        return
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, method in enumerate(shown):
        densities = sorted({row["density"] for row in rows if row["method"] == method})
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 6}
        style["linestyle"] = "-" if index < len(COLOURS) else "--"
        removed = [100 * (1 - density) for density in densities]
        found = [_pick(rows, method, density) for density in densities]
        left.plot(removed, [100 * mean(r["accuracy"] for r in f) for f in found], label=method, **style)
        right.plot(removed, [mean(r["divergence"] for r in f) for f in found], label=method, **style)
    left.set(xlabel="channels removed, %", ylabel="LongEval lines, % right", ylim=(-3, 103))
    right.set(xlabel="channels removed, %", ylabel="KL from uncompressed, nats per token", yscale="log")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))


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

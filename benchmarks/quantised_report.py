"""The table and the figure of `quantised.py`'s results, into docs/quantisation.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from common import Row, accuracy, fill_page, measured_on
from matplotlib.figure import Figure

from cskv.files import write_atomically
from cskv.plots import COLOURS, MARKERS, STYLE

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "quantisation.md"
KINDS = {
    "uncompressed": "uncompressed",
    "QuantizedCache": "transformers' QuantizedCache",
    "mixed": "cskv, mixed widths",
}
Found = list[Row]


def write_report(results: dict[str, Any], names: Sequence[str]) -> None:
    """Put the table between the page's markers, and draw the figure."""
    rows = list(results["rows"].values())
    by_name = {name: [row for row in rows if row["name"] == name] for name in names}
    found = {name: own for name, own in by_name.items() if own}
    text = f"{measured_on(results['environment'], 'quantised', rows)}\n\n{_table(found)}\n\n{_losses(found)}"
    fill_page(PAGE, "quantised", text)
    with matplotlib.rc_context(STYLE):
        _draw(found, DOCS / "figures" / "quantised.png")


def _table(found: dict[str, Found]) -> str:
    lines = [
        "| cache | bytes of bf16 | latents | scales, minima | window | slack, positions | LongEval % right (95 %) "
        "| perplexity | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        caches = [row["cache"] for row in own]
        shares = [
            mean(sum(cache[f"{part}_bytes"] for part in parts) / cache["uncompressed_bytes"] for cache in caches)
            for parts in (("payload",), ("scale", "minimum"), ("window",), ("slack", "position"))
        ]
        parts = [f"{share:.1%}" if shares[0] else "" for share in shares]
        ratio = mean(cache["ratio"] for cache in caches)
        kl = f"{mean(row['kl'] for row in own):.4f}" if "kl" in own[0] else ""
        figures = [f"{ratio:.1%}", *parts, accuracy(own), f"{mean(row['perplexity'] for row in own):.2f}", kl]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _losses(found: dict[str, Found]) -> str:
    """The reconstruction loss, summed over layers, before and after training through the grid."""
    lines = ["| reconstruction loss of held-out text | keys | values |", "|---|---|---|"]
    for name, own in found.items():
        if name.startswith("20 %") and all("loss" in row for row in own):
            k, v = (mean(row["loss"][kind] for row in own) for kind in ("k", "v"))
            lines.append(f"| {name} | {k:.4f} | {v:.4f} |")
    return "\n".join(lines)


def _kind(name: str) -> str:
    return next((title for start, title in KINDS.items() if name.startswith(start)), "cskv, one width")


def _draw(found: dict[str, Found], path: Path) -> None:
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(map(_kind, found)))
    for index, kind in enumerate(kinds):
        own = [rows for name, rows in found.items() if _kind(name) == kind]
        ratios = [100 * mean(row["cache"]["ratio"] for row in rows) for rows in own]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
        left.plot(ratios, [100 * mean(r["accuracy"] for r in rows) for rows in own], label=kind, **style)
        right.plot(ratios, [mean(r["perplexity"] for r in rows) for rows in own], label=kind, **style)
    for axes, label in ((left, "LongEval lines, % right"), (right, "perplexity of held-out text")):
        axes.set(xlabel="bytes, % of the bf16 cache (1920-token prompt)", ylabel=label, xscale="log")
        axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
    left.set_ylim(-3, 103)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))

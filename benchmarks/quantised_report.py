"""The table and the figure of `quantised.py`'s results, into docs/quantisation.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from common import Row
from pages import DOCS, Table, accuracy, draw_pair, fill_page, measured_on

KINDS = {
    "uncompressed": "uncompressed",
    "QuantizedCache": "transformers' QuantizedCache",
    "mixed": "cskv, mixed widths",
}
PARTS = {
    "latents": ("payload",),
    "scales, minima": ("scale", "minimum"),
    "window": ("window",),
    "slack, positions": ("slack", "position"),
}
Found = dict[str, list[Row]]


def write_report(results: dict[str, Any], names: Sequence[str]) -> None:
    """Put the tables between the page's markers, and draw the figure."""
    rows = list(results["rows"].values())
    by_name = {name: [row for row in rows if row["name"] == name] for name in names}
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
        kind = next((title for start, title in KINDS.items() if name.startswith(start)), "cskv, one width")
        right, text = (mean(row[of] for row in own) for of in ("accuracy", "perplexity"))
        series.setdefault(kind, []).append((100 * mean(row["cache"]["ratio"] for row in own), 100 * right, text))
    label, ticks = "bytes, % of the bf16 cache (1920-token prompt)", (5, 10, 20, 50, 100)
    path = DOCS / "figures" / "quantised.png"
    draw_pair(path, series, label, {"ylabel": "perplexity of held-out text"}, ticks=ticks)

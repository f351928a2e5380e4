"""The demo's results as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cskv.errors import DataError
from cskv.plots.style import COLOURS, MARKERS, new_figure, readable_scale, save, side_by_side, styled


@styled
def plot_demo(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw accuracy (with its interval) and perplexity over cache bytes per token, one point per row.

    Args:
        rows: each with name, bytes_per_token, accuracy, low, high, perplexity and num_lines.
        path: the PNG (or PDF, SVG) to write.

    Raises:
        DataError: no rows.
        CSKVError: the file cannot be written.
    """
    if not rows:
        raise DataError("no results to draw; give at least one row")
    figure = new_figure(10.0, 5.0)
    accuracy, perplexity = figure.subplots(1, 2)
    sizes = [row["bytes_per_token"] for row in rows]
    places = side_by_side(sizes, 0.02 * max(sizes))
    for index, (row, x) in enumerate(zip(rows, places, strict=True)):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 9}
        share, low, high = (100 * row[name] for name in ("accuracy", "low", "high"))
        spread = [[share - low], [high - share]]
        accuracy.errorbar(x, share, yerr=spread, capsize=4, linestyle="none", label=row["name"], **style)
        perplexity.plot(x, row["perplexity"], linestyle="none", **style)
    accuracy.set(title=f"LongEval lines, {rows[0]['num_lines']} lines", ylabel="accuracy, % (95 % interval)")
    lowest = 100 * min(row["low"] for row in rows)
    accuracy.set_ylim(max(-5.0, 10 * (lowest // 10) - 5), 101)
    perplexity.set(title="Held-out text, through the cache", ylabel="perplexity (lower is better)")
    perplexities = [row["perplexity"] for row in rows]
    readable_scale(perplexity, min(perplexities), max(perplexities))
    for ax in (accuracy, perplexity):
        ax.set_xlabel("real cache bytes per token (equal ones side by side)")
        ax.set_xlim(0, 1.08 * max(sizes))
    handles, names = accuracy.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(rows)), frameon=False)
    figure.suptitle("What a smaller KV cache costs")
    return save(figure, path)

"""Sizes and results, laid out for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from cskv.evaluation.results import Run

MOST_WITH_NOTES = 4
PARTS = {
    "payload": "latents",
    "scale": "scales",
    "minimum": "minima",
    "window": "exact tokens",
    "position": "positions",
    "slack": "slack",
    "other": "uncompressed layers",
}


def cache_lines(sizes: dict[str, Any]) -> list[str]:
    """Return two lines on the sizes that `CacheReport.to_dict` gives; parts of no bytes are left out."""
    parts = ", ".join(f"{name} {sizes[f'{key}_bytes']:,}" for key, name in PARTS.items() if sizes[f"{key}_bytes"])
    return [
        f"cache of {sizes['tokens']:,} tokens: {sizes['total_bytes']:,} bytes allocated ({parts})",
        f"uncompressed it would take {sizes['uncompressed_bytes']:,} bytes; this is {sizes['ratio']:.1%} of it",
    ]


def results_table(run: Run) -> Table:
    """Return a table of a row per method and budget, all seeds together; the best of a budget is bold.

    Many columns leave no room for intervals, which the result file has.
    """
    from cskv.evaluation.pooling import pool
    from cskv.report.summary import summarise

    summary = summarise(pool(run.rows))
    with_notes = len(summary.columns) <= MOST_WITH_NOTES
    table = Table(title=f"{run.model['name'] or run.model['type']}: means of all seeds", title_justify="left")
    table.add_column("cache", overflow="fold")
    table.add_column("bytes per token", justify="right", overflow="fold")
    table.add_column("of uncompressed", justify="right", overflow="fold")
    for title, note in summary.columns:
        table.add_column(f"{title}\n[dim]{note}[/dim]", justify="right", overflow="fold")
    for group in summary.groups:
        for line in group:
            budget = "" if line.budget is None else f" {100 * line.budget:.3g} %"
            cells = [
                (f"[bold]{entry.text}[/bold]" if entry.best else entry.text)
                + (f" [dim]{entry.note}[/dim]" if entry.note and with_notes else "")
                for entry in line.entries
            ]
            table.add_row(f"{line.method}{budget}", line.bytes_per_token, line.ratio, *cells)
        table.add_section()
    return table

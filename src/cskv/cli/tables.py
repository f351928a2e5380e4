"""Results as tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

MOST_WITH_NOTES = 4

if TYPE_CHECKING:
    from cskv.evaluation.results import Run


def results_table(run: Run) -> Table:
    """A row per method and budget, all seeds together; the best of a budget is bold. Many columns leave no room for
    intervals, which the result file has.
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

"""Sizes and results, laid out for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cskv.evaluation.results import Run
    from cskv.report.summary import Entry, Line

MOST_WITH_NOTES = 4
Column = tuple[str, list[str]]  # heading and cells, as markup
BORDER = 3  # of a column: a line, and a space on either side
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


def results_tables(run: Run, console: Console) -> list[Table]:
    """Return a row per method and budget, all seeds together; the best of a budget is bold.

    Many columns leave no room for intervals, which the result file has. Columns that the console has no room for
    without breaking words go on in another table.
    """
    from cskv.evaluation.pooling import pool
    from cskv.report.summary import summarise

    summary = summarise(pool(run.rows))
    lines = [line for group in summary.groups for line in group]
    with_notes = len(summary.columns) <= MOST_WITH_NOTES
    columns = [("bytes per token", [line.bytes_per_token for line in lines])]
    columns.append(("of uncompressed", [line.ratio for line in lines]))
    for index, (title, note) in enumerate(summary.columns):
        columns.append((f"{title}\n[dim]{note}[/dim]", [_cell(line.entries[index], with_notes) for line in lines]))

    title = f"{run.model['name'] or run.model['type']}: means of all seeds"
    names = [_name(line) for line in lines]
    first = _longest_word("cache", names)
    ends = {id(group[-1]) for group in summary.groups}
    tables: list[Table] = []
    for chosen in _fitting(columns, console.width - first - BORDER - 1):
        table = Table(title=None if tables else title, title_justify="left")
        kept = [("cache", names), *chosen]
        widths = _widths(kept, console.width - 1 - BORDER * len(kept))
        for index, ((heading, _), width) in enumerate(zip(kept, widths, strict=True)):
            table.add_column(heading, justify="right" if index else "left", width=width)
        rows = zip(names, *(cells for _, cells in chosen), strict=True)
        for line, row in zip(lines, rows, strict=True):
            table.add_row(*row, end_section=id(line) in ends)
        tables.append(table)
    return tables


def _fitting(columns: list[Column], width: int) -> Iterator[list[Column]]:
    """Yield columns by as many as fit without breaking a word, at least one."""
    chosen: list[Column] = []
    left = width
    for column in columns:
        left -= (needed := _longest_word(*column) + BORDER)
        if chosen and left < 0:
            yield chosen
            chosen, left = [], width - needed
        chosen.append(column)
    yield chosen


def _widths(columns: list[Column], room: int) -> list[int]:
    """Return widths that break no word, nor, from the first column on, a line, as far as there is room."""
    widths = [_longest_word(*column) for column in columns]
    for index, (heading, cells) in enumerate(columns):
        whole = max(len(line) for line in Text.from_markup("\n".join([heading, *cells])).plain.splitlines())
        widths[index] += min(whole - widths[index], max(0, room - sum(widths)))
    return widths


def _longest_word(heading: str, cells: list[str]) -> int:
    return max(len(word) for word in Text.from_markup("\n".join([heading, *cells])).plain.split())


def _name(line: Line) -> str:
    return line.method if line.budget is None else f"{line.method} {100 * line.budget:.3g} %"


def _cell(entry: Entry, with_notes: bool) -> str:
    text = f"[bold]{entry.text}[/bold]" if entry.best else entry.text
    return text + (f" [dim]{entry.note}[/dim]" if entry.note and with_notes else "")

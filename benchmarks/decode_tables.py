"""Tables of the decode benchmark's results, as rows of cells: on the terminal by rich, on a page in markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import Row
from decode_methods import BEST, POSITIONS, SDPA, methods
from decode_timing import slope


@dataclass(frozen=True)
class Table:
    """Headings and cells."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """For a page."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.headings) + " |", "|" + "---|" * len(self.headings)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows])

    def print(self) -> None:
        """By rich where it is installed."""
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            print(self.markdown(), flush=True)
            return
        table = RichTable(title=self.title)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        Console().print(table)


def measured(results: dict[str, Any], batch: int) -> list[Row]:
    """The rows of a batch size that were not skipped, by length."""
    rows = [row for row in results["rows"].values() if row["batch"] == batch and "skipped" not in row]
    return sorted(rows, key=lambda row: row["tokens"])


def batches(results: dict[str, Any]) -> list[int]:
    """The batch sizes that were measured."""
    return sorted({row["batch"] for row in results["rows"].values() if "skipped" not in row})


def median(row: Row, name: str) -> float | None:
    """Seconds of a step; None where the method was skipped."""
    seconds = row["methods"].get(name, {}).get("seconds")
    return None if seconds is None else seconds["median"]


def speedup(row: Row, name: str, baseline: str) -> float | None:
    """How many times faster than a baseline."""
    ours, theirs = median(row, name), median(row, baseline)
    return None if ours is None or theirs is None else theirs / ours


def tables(results: dict[str, Any]) -> list[Table]:
    """All tables: speedups per batch size, slopes, and bytes; on a GPU milliseconds as well."""
    found = []
    for batch in batches(results):
        rows = measured(results, batch)
        found.append(_speedups(rows, batch, SDPA))
        found.append(_speedups(rows, batch, BEST))
        if results["settings"]["device"] == "cuda":
            found.append(_milliseconds(rows, batch))
    found.append(_slopes(results))
    found.append(_bytes(results))
    skipped = _skipped(results)
    return [*found, skipped] if skipped.rows else found


def print_tables(results: dict[str, Any]) -> None:
    """To the terminal."""
    for table in tables(results):
        table.print()


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in methods() if any(median(row, name) is not None for row in rows)]


def _lengths(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(_thousands(row["tokens"]) for row in rows)


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def _speedups(rows: list[Row], batch: int, baseline: str) -> Table:
    cells = tuple(
        (name, *(_times(speedup(row, name, baseline)) for row in rows)) for name in _names(rows) if name != POSITIONS
    )
    return Table(f"Batch {batch}: times as fast as {baseline}", ("method", *_lengths(rows)), cells)


def _milliseconds(rows: list[Row], batch: int) -> Table:
    cells = []
    for name in _names(rows):
        parts = [row["methods"][name].get("seconds") for row in rows]
        shown = [
            "" if s is None else f"{1e3 * s['median']:.3f} ({1e3 * s['p10']:.3f}-{1e3 * s['p90']:.3f})" for s in parts
        ]
        cells.append((name, *shown))
    title = f"Batch {batch}: milliseconds a step, median (10th-90th percentile)"
    return Table(title, ("method", *_lengths(rows)), tuple(cells))


def slopes(results: dict[str, Any], batch: int) -> dict[str, float]:
    """Nanoseconds per cached token and sequence of every method, by least squares over the lengths."""
    rows = measured(results, batch)
    points = {name: [(row["tokens"], median(row, name)) for row in rows] for name in _names(rows)}
    return {
        name: 1e9 / batch * slope([(x, y) for x, y in found if y is not None])  # type: ignore[misc]
        for name, found in points.items()
    }


def _slopes(results: dict[str, Any]) -> Table:
    """As shares of the baseline's on a CPU, in nanoseconds on a GPU."""
    by_batch = {batch: slopes(results, batch) for batch in batches(results)}
    is_gpu = results["settings"]["device"] == "cuda"
    names = [name for name in methods() if any(name in found for found in by_batch.values())]
    cells = []
    for name in names:
        shown = []
        for found in by_batch.values():
            value = found.get(name, float("nan")) / (1.0 if is_gpu else found[SDPA])
            shown.append("" if value != value else f"{value:.3f}")
        cells.append((name, *shown))
    unit = "nanoseconds per cached token and sequence" if is_gpu else f"as a share of {SDPA}'s"
    title = f"Slope of a step's time over the cached tokens (least squares), {unit}"
    return Table(title, ("method", *(f"batch {batch}" for batch in by_batch)), tuple(cells))


def _bytes(results: dict[str, Any]) -> Table:
    rows = measured(results, min(batches(results))) if batches(results) else []
    cells = []
    for name in _names(rows):
        if name == POSITIONS:
            continue
        shares = [row["methods"].get(name, {}).get("nbytes", 0) / row["methods"][SDPA]["nbytes"] for row in rows]
        cells.append((name, *(f"{share:.1%}" if share else "" for share in shares)))
    title = f"Bytes allocated, as a share of {SDPA}'s (batch {rows[0]['batch'] if rows else '-'})"
    return Table(title, ("method", *_lengths(rows)), tuple(cells))


def _skipped(results: dict[str, Any]) -> Table:
    cells = {
        (f"batch {r['batch']}, {_thousands(r['tokens'])}", r["skipped"])
        for r in results["rows"].values()
        if "skipped" in r
    }
    for row in results["rows"].values():
        cells |= {(name, m["skipped"]) for name, m in row.get("methods", {}).items() if "skipped" in m}
    return Table("Not measured", ("what", "why"), tuple(sorted(cells)))

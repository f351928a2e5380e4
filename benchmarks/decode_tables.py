"""Tables of the decode benchmark's results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from common import Row
from decode_methods import BEST, POSITIONS, SDPA, methods
from decode_timing import slope
from pages import Table


def measured(results: dict[str, Any], batch: int) -> list[Row]:
    """Return the rows of a batch size that were not skipped, by length."""
    rows = [row for row in results["rows"].values() if row["batch"] == batch and "skipped" not in row]
    return sorted(rows, key=lambda row: row["tokens"])


def batches(results: dict[str, Any]) -> list[int]:
    """Return the batch sizes that were measured."""
    return sorted({row["batch"] for row in results["rows"].values() if "skipped" not in row})


def median(row: Row, name: str) -> float | None:
    """Return the seconds of a step; None where the method was skipped."""
    seconds = row["methods"].get(name, {}).get("seconds")
    return None if seconds is None else seconds["median"]


def speedup(row: Row, name: str, baseline: str) -> float | None:
    """Return how many times faster a method is than a baseline."""
    ours, theirs = median(row, name), median(row, baseline)
    return None if ours is None or theirs is None else theirs / ours


def tables(results: dict[str, Any]) -> list[Table]:
    """Make all tables: speedups per batch size, slopes, and bytes; on a GPU milliseconds as well."""
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


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in methods() if any(median(row, name) is not None for row in rows)]


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _over_lengths(title: str, rows: Sequence[Row], show: Callable[[Row, str], str], without: str = "") -> Table:
    """Make a table with a row per method and a column per length."""
    cells = [(name, *(show(row, name) for row in rows)) for name in _names(rows) if name != without]
    return Table(title, ("method", *(_thousands(row["tokens"]) for row in rows)), cells)


def _speedups(rows: list[Row], batch: int, baseline: str) -> Table:
    def times(row: Row, name: str) -> str:
        value = speedup(row, name, baseline)
        return "" if value is None else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"

    return _over_lengths(f"Batch {batch}: times as fast as {baseline}", rows, times, POSITIONS)


def _milliseconds(rows: list[Row], batch: int) -> Table:
    def show(row: Row, name: str) -> str:
        s = row["methods"][name].get("seconds")
        return "" if s is None else f"{1e3 * s['median']:.3f} ({1e3 * s['p10']:.3f}-{1e3 * s['p90']:.3f})"

    return _over_lengths(f"Batch {batch}: milliseconds a step, median (10th-90th percentile)", rows, show)


def slopes(results: dict[str, Any], batch: int) -> dict[str, float]:
    """Return nanoseconds per cached token and sequence of every method, by least squares over the lengths."""
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

    def show(found: dict[str, float], name: str) -> str:
        value = found.get(name, math.nan) / (1.0 if is_gpu else found[SDPA])
        return "" if math.isnan(value) else f"{value:.3f}"

    names = [name for name in methods() if any(name in found for found in by_batch.values())]
    cells = [(name, *(show(found, name) for found in by_batch.values())) for name in names]
    unit = "nanoseconds per cached token and sequence" if is_gpu else f"as a share of {SDPA}'s"
    title = f"Slope of a step's time over the cached tokens (least squares), {unit}"
    return Table(title, ("method", *(f"batch {batch}" for batch in by_batch)), tuple(cells))


def _bytes(results: dict[str, Any]) -> Table:
    def share(row: Row, name: str) -> str:
        own = row["methods"].get(name, {}).get("nbytes", 0) / row["methods"][SDPA]["nbytes"]
        return f"{own:.1%}" if own else ""

    rows = measured(results, min(batches(results))) if batches(results) else []
    title = f"Bytes allocated, as a share of {SDPA}'s (batch {rows[0]['batch'] if rows else '-'})"
    return _over_lengths(title, rows, share, POSITIONS)


def _skipped(results: dict[str, Any]) -> Table:
    rows = results["rows"].values()
    cells = {(f"batch {r['batch']}, {_thousands(r['tokens'])}", r["skipped"]) for r in rows if "skipped" in r}
    for row in rows:
        cells |= {(name, m["skipped"]) for name, m in row.get("methods", {}).items() if "skipped" in m}
    return Table("Not measured", ("what", "why"), tuple(sorted(cells)))

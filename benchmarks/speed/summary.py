"""What a folder that `benchmarks/gpu.sh` filled says, in less than a hundred lines: the goals last.

python -m benchmarks.speed.summary OUT_DIR
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import read_results
from benchmarks.pages import Table
from benchmarks.speed import gpu, graph, ncu, paged, tables

MOST, WIDTH = 20, 170  # lines of a table, and characters of a line


def found(folder: Path) -> Iterator[Table]:
    """Make the tables of what there is."""
    decode, whole, pages, tuned, seen = (
        read_results(folder / f"{name}.json") for name in ("decode", "graph", "paged", "gpu", "ncu")
    )
    if decode["rows"]:
        yield tables.calls_at_a_glance(decode)
    if whole["rows"]:
        yield graph.at_a_glance(whole)
    if pages["rows"]:
        yield from paged.tables(pages)
    if seen["rows"]:
        yield ncu.table(seen)
    if tuned["rows"]:
        yield from gpu.tables(tuned)
    yield failures({"decode": decode, "graph": whole, "paged": pages, "gpu": tuned})
    if whole["rows"]:
        yield graph.goals(whole)
    yield tables.gpu_goals(decode)


def failures(results: dict[str, dict[str, Any]]) -> Table:
    """List what failed, and what lost the GPU."""
    lines = []
    for name, own in results.items():
        lines += [(name, lost, "it lost the GPU") for lost in own.get("lost", ())]
        for cell, row in own["rows"].items():
            methods = row.get("methods", {}).items()
            lines += [(f"{name}, {cell}", method, one["failed"]) for method, one in methods if "failed" in one]
            lines += [
                (f"{name}, {cell}", method, f"no graph: {one['graph_error']}")
                for method, one in methods
                if "graph_error" in one
            ]
    return Table("Failed", ("where", "what", "why"), lines)


def lines_of(table: Table) -> list[str]:
    """Return a table as plain lines; none of a table without rows."""
    if not table.rows:
        return []
    rows = [table.headings, *table.rows[:MOST]]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    padded = ("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    more = [f"and {len(table.rows) - MOST} more"] if len(table.rows) > MOST else []
    return [f"-- {table.title}", *(line.rstrip()[:WIDTH] for line in padded), *more]


def main(arguments: list[str]) -> int:
    """Print what there is."""
    for table in found(Path(arguments[0])):
        if lines := lines_of(table):
            print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

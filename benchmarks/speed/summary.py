"""The tables of a folder that `benchmarks/gpu.sh` filled, as text: the goals first, and no more than a screen of each.

python -m benchmarks.speed.summary OUT_DIR
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.common import read_results
from benchmarks.pages import Table
from benchmarks.speed.tables import gpu_goals

OTHERS = ("graph", "paged", "gpu")


def lines_of(table: Table) -> list[str]:
    """Return a table as plain lines."""
    rows = [table.headings, *table.rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    padded = ("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [table.title, *(line.rstrip() for line in padded)]


def main(arguments: list[str]) -> int:
    """Print what there is."""
    folder = Path(arguments[0])
    tables = [gpu_goals(read_results(folder / "decode.json"))]
    for name in OTHERS:
        results = read_results(folder / f"{name}.json")
        if results["rows"]:
            tables += importlib.import_module(f"benchmarks.speed.{name}").BENCHMARK.tables(results)
    for table in tables:
        print("\n".join(lines_of(table)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

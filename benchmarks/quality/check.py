"""Hold a rerun against the committed results, figure by figure.

Every score, perplexity and KL of the rerun has to lie in the committed row's 95 % interval; rows that only one side has
are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.pages import Table
from cskv.errors import DataError
from cskv.evaluation.results import KEY, Row, read_run

INTERVALS: Mapping[str, str | tuple[str, str]] = {
    "score": ("low", "high"),
    "perplexity": "perplexity_interval",
    "kl": "kl_interval",
    "top1": "top1_interval",
}


def check_folder(rerun: Path, committed: Path) -> int:
    """Compare the files that both folders have, and print a table; 1 if a figure is outside.

    Raises:
        DataError: there is no figure to compare.
    """
    cells = []
    total = wrong = 0
    for path in sorted(rerun.glob("*.json")):
        if (committed / path.name).exists():
            compared, missing, outside = departures(read_run(path).rows, read_run(committed / path.name).rows)
            total, wrong = total + compared, wrong + len(outside)
            what = "; ".join(f"{' '.join(map(str, key_of(row)))}: {text}" for row, text in outside)
            cells.append([path.stem, str(compared), str(missing), what or "none"])
    if not total:
        raise DataError(f"{rerun} has no figure that {committed} has as well; expected files of the same names")
    headings = ("file", "compared", "rows of one side", "outside the interval")
    Table(f"{rerun} against the committed results", headings, cells).print()
    return int(bool(wrong))


def key_of(row: Row) -> tuple[object, ...]:
    """Return what a row is of."""
    return tuple(row[name] for name in KEY)


def departures(new: list[Row], old: list[Row]) -> tuple[int, int, list[tuple[Row, str]]]:
    """Count compared figures and rows that only one side has, and list what lies outside its interval."""
    rerun, committed = ({key_of(row): row for row in rows} for rows in (new, old))
    compared, outside = 0, []
    for key in rerun.keys() & committed.keys():
        row, before = rerun[key], committed[key]
        for name, where in INTERVALS.items():
            interval = before.get(where) if isinstance(where, str) else [before.get(bound) for bound in where]
            if name in row and interval and None not in interval:
                compared += 1
                if not interval[0] <= row[name] <= interval[1]:
                    outside.append((row, f"{name} {row[name]:.4g}, expected {interval[0]:.4g} to {interval[1]:.4g}"))
    return compared, len(rerun.keys() ^ committed.keys()), outside

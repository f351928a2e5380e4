"""Compare a rerun of `make results` with the committed results, figure by figure.

    python benchmarks/results_check.py [outputs/results [docs/results]]

Every score of the rerun has to lie in the committed row's 95 % interval and every perplexity in its own; rows that one
side lacks are counted. Exits with 1 if one does not agree, or nothing could be compared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from common import ROOT
from pages import Table
from results import OUT, PARTS

from cskv.evaluation.results import KEY, Row, read_run


def key_of(row: Row) -> tuple[object, ...]:
    """Return what a row is of."""
    return tuple(row[name] for name in KEY)


def departures(new: list[Row], old: list[Row]) -> tuple[int, int, list[tuple[Row, str]]]:
    """Count compared figures and rows that only one side has, and list what lies outside its interval."""
    rerun, committed = ({key_of(row): row for row in rows} for rows in (new, old))
    compared, outside = 0, []
    for key in rerun.keys() & committed.keys():
        row, before = rerun[key], committed[key]
        bounds = [before.get("low"), before.get("high")]
        for name, interval in (("score", bounds), ("perplexity", before.get("perplexity_interval"))):
            if name in row and interval and None not in interval:
                compared += 1
                if not interval[0] <= row[name] <= interval[1]:
                    outside.append((row, f"{name} {row[name]:.4g}, expected {interval[0]:.4g} to {interval[1]:.4g}"))
    return compared, len(rerun.keys() ^ committed.keys()), outside


def main(
    rerun: Annotated[Path, typer.Argument(help="Folder of the rerun.")] = OUT,
    committed: Annotated[Path, typer.Argument(help="Folder to hold it against.")] = ROOT / "docs" / "results",
) -> None:
    """Compare all parts that both folders have."""
    cells = []
    total = wrong = 0
    for part, name in PARTS.items():
        if (rerun / name).exists() and (committed / name).exists():
            compared, missing, outside = departures(read_run(rerun / name).rows, read_run(committed / name).rows)
            total, wrong = total + compared, wrong + len(outside)
            what = "; ".join(f"{' '.join(map(str, key_of(row)))}: {text}" for row, text in outside)
            cells.append([part, str(compared), str(missing), what or "none"])
    headings = ("part", "compared", "rows of one side", "outside the interval")
    Table(f"{rerun} against {committed}", headings, cells).print()
    sys.exit(1 if wrong or not total else 0)


if __name__ == "__main__":
    typer.run(main)

"""Sources of a report: runs of one model, the rows that count, and spectra."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cskv.errors import DataError
from cskv.evaluation.results import FORMAT, KEY, Row, Run, read_run
from cskv.evaluation.spectra import Spectrum, read_csv

SPECTRA = "spectra.csv"


@dataclass(frozen=True)
class Sources:
    """Everything that goes into a report.

    Attributes:
        runs: of one model, oldest first.
        spectra: of `cskv analyze`; may be empty.
        passed_over: files of a folder that hold no results.
    """

    runs: list[Run]
    spectra: list[Spectrum] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Replaced:
    """Rows of one run that another, newer run has as well."""

    older: Run
    newer: Run
    count: int
    settings: list[str]


def gather(paths: Iterable[str | Path]) -> Sources:
    """Read result files, folders of them, and at most one CSV file of spectra.

    Of a folder, the JSON files that are result files and `spectra.csv` are read; folders inside are not.

    Raises:
        DataError: a file is missing or damaged, nothing holds results, or the runs are of several models.
    """
    results, tables, passed_over = _files(paths)
    if len(tables) > 1:
        raise DataError(
            f"got spectra in {', '.join(map(str, tables))}; a report shows those of one model: give one file"
        )
    runs = [read_run(path) for path in results]
    if not any(run.rows for run in runs):
        raise DataError("no result row to report; give JSON files that `cskv evaluate` wrote, or a folder of them")
    _check(runs)
    runs.sort(key=lambda run: (_date(run), str(run.path)))
    return Sources(runs, [spectrum for path in tables for spectrum in read_csv(path)], passed_over)


def _files(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Find result files, tables of spectra, and what is passed over in folders; every file once."""
    results: dict[Path, Path] = {}
    tables: dict[Path, Path] = {}
    passed_over = []
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.glob("*.json")):
                if _is_result(file):
                    results.setdefault(file.resolve(), file)
                else:
                    passed_over.append(file)
            if (path / SPECTRA).is_file():
                tables.setdefault((path / SPECTRA).resolve(), path / SPECTRA)
        else:
            (tables if path.suffix.lower() == ".csv" else results).setdefault(path.resolve(), path)
    return list(results.values()), list(tables.values()), passed_over


def _is_result(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _check(runs: Sequence[Run]) -> None:
    """Find out whether the heads of runs are whole and of one model."""
    for run in runs:
        for name in ("settings", "model", "environment", "methods"):
            if not isinstance(getattr(run, name), dict):
                raise DataError(f"{name} of {run.path} are no object; expected a file that `cskv evaluate` wrote")
    for run in runs[1:]:
        if _identity(run) != _identity(runs[0]):
            described = (
                f"{entry.path} of {entry.model.get('name')} (fingerprint {entry.model.get('fingerprint')})"
                for entry in (runs[0], run)
            )
            raise DataError(
                f"results are of different models: {', '.join(described)}; a report compares methods on one model: "
                "make one for each"
            )


def _identity(run: Run) -> tuple[Any, Any]:
    """Return the model's fingerprint, whatever it is called; its name where there is none."""
    fingerprint = run.model.get("fingerprint")
    return fingerprint, None if fingerprint else run.model.get("name")


def _date(run: Run) -> datetime:
    """Return when a run was measured; the beginning of time where it does not say."""
    try:
        date = datetime.fromisoformat(run.environment["date"])
    except (KeyError, TypeError, ValueError):
        return datetime.min.replace(tzinfo=UTC)
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def newest_rows(runs: Sequence[Run]) -> tuple[list[Row], list[Replaced]]:
    """Return the newest run's row of each key, in the order of the runs, and which rows gave way.

    Args:
        runs: oldest first.
    """
    newest = {_key(row): index for index, run in enumerate(runs) for row in run.rows}
    given_way: Counter[tuple[int, int]] = Counter()
    rows: list[Row] = []
    for index, run in enumerate(runs):
        own = {_key(row): row for row in run.rows}  # the last of a run's own: it was added to mend an earlier one
        rows += [row for key, row in own.items() if newest[key] == index]
        given_way.update((index, newest[key]) for key in own if newest[key] != index)
    return rows, [
        Replaced(runs[older], runs[newer], count, _different(runs[older].settings, runs[newer].settings))
        for (older, newer), count in given_way.items()
    ]


def _key(row: Row) -> str:
    return json.dumps([row[name] for name in KEY])


def _different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))

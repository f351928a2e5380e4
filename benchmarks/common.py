"""What the benchmarks share: rows that are measured once and kept, and pages that are filled in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cskv.evaluation.environment import environment
from cskv.evaluation.wilson import wilson_interval
from cskv.files import write_text

Row = dict[str, Any]


def read_results(path: Path) -> dict[str, Any]:
    """The results kept so far, or none: `rows` by name, and what else a benchmark keeps."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}


def measure_missing(path: Path, results: dict[str, Any], jobs: Mapping[str, Callable[[], Row]]) -> None:
    """Measure the rows that `results` lacks, with a bar, and write the file after each."""
    todo = [name for name in jobs if name not in results["rows"]]
    if todo:
        results["environment"] = environment().to_dict()
    for name in _with_bar(todo):
        results["rows"][name] = jobs[name]()
        write_text(path, json.dumps(results, indent=1, sort_keys=True) + "\n")


def _with_bar(names: Sequence[str]) -> Iterator[str]:
    """The names, one after the other, with a bar where rich is installed and a line each where it is not."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left
    except ImportError:
        for index, name in enumerate(names, start=1):
            print(f"{index}/{len(names)} {name}", file=sys.stderr, flush=True)
            yield name
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), Left(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            yield name
            progress.advance(task)


def fill_page(page: Path, script: str, text: str) -> None:
    """Put text between a page's two markers of a script."""
    begin, end = f"<!-- measured: benchmarks/{script}.py -->", f"<!-- end of {script} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def measured_on(where: Mapping[str, Any], script: str, rows: Sequence[Row] = ()) -> str:
    """On what, when and from which seeds rows were measured."""
    seeds = sorted({row["seed"] for row in rows})
    text = (
        f"Measured on {where['accelerator'] or where['cpu']}, {where['threads']} thread(s), torch {where['torch']}, "
        f"transformers {where['transformers']}, {where['date'][:10]}"
    )
    if seeds:
        text += f"; seeds {', '.join(map(str, seeds))}; {rows[0]['cases']} questions per seed; means over seeds"
    return f"{text}. Reproduce with `python benchmarks/{script}.py`."


def accuracy(rows: Sequence[Row]) -> str:
    """Per cent right over all seeds, with the 95 % interval."""
    right, cases = sum(row["accuracy"] * row["cases"] for row in rows), sum(row["cases"] for row in rows)
    low, high = wilson_interval(round(right), cases)
    return f"{100 * right / cases:.0f} ({100 * low:.0f}-{100 * high:.0f})"

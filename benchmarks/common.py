"""Rows that are measured once and kept in a file: {"settings", "environment", "rows": {name: row}}."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Threads that spin while they wait halve the speed of whatever else runs on the machine. The variable is read as torch
# is loaded; benchmarks that measure speed load it before, and spin.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cskv.evaluation.environment import environment
from cskv.files import write_text

if TYPE_CHECKING:
    from benchmarks.pages import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tinymodel" / "checkpoint"
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
Jobs = Mapping[str, Callable[[], Row]]
Show = Callable[[dict[str, Any]], Sequence["Table"]]


class Wrong(Exception):
    """A method's output is not what it should be: nothing may be reported."""


class Lost(Exception):
    """The GPU answers nothing in this process any more. The message is what is not to be tried again."""


def read_results(path: Path) -> dict[str, Any]:
    """Return the results kept so far, or none: `rows` by name, and what else a benchmark keeps."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, atomically."""
    write_text(path, json.dumps(results, indent=1, sort_keys=True) + "\n")


def measure_missing(
    path: Path,
    results: dict[str, Any],
    jobs: Jobs,
    methods: Collection[str] = (),
    *,
    seconds: float = math.inf,
    keep_going: bool = False,
) -> dict[str, Exception]:
    """Measure the rows that `results` lacks, or that lack one of `methods`, and write the file after each.

    No row is begun after so many seconds. With `keep_going` a row that fails stops nothing: what failed is returned.
    What loses the GPU is noted as `lost`, and not tried again by the next process.
    """
    rows, asked, lost = results["rows"], set(methods), results.get("lost", [])
    failed: dict[str, Exception] = {name: Lost(name) for name in jobs if name in lost}
    todo = [name for name in jobs if name not in rows or not asked <= set(rows[name].get("methods", asked))]
    todo = [name for name in todo if name not in failed]
    if todo:
        results["environment"] = environment().to_dict()
    first = time.monotonic()
    for name in _with_bar(todo) if todo else ():
        began = time.monotonic()
        if began - first > seconds:
            failed[name] = TimeoutError("no time left")
            continue
        try:
            rows[name] = jobs[name]() | {"wall_seconds": time.monotonic() - began}
        except Exception as error:
            if not keep_going:
                raise
            traceback.print_exc(limit=-4)
            failed[name] = error.with_traceback(None)  # which keeps what the job has made
            if isinstance(error, Lost) or is_lost():
                results["lost"] = [*lost, str(error) if isinstance(error, Lost) else name]
                write_results(path, results)
                raise Lost(results["lost"][-1]) from error
        else:
            write_results(path, results)
    return failed


def run(path: Path, settings: Row, jobs: Jobs, show: Show, methods: Collection[str] = (), **how: Any) -> int:
    """Measure what a file of the same settings lacks, rows or `methods` of a row, and print what `show` makes of it.

    A job raises `Wrong` if an output is. `how` is for `measure_missing`. The exit code is returned.
    """
    results = read_results(path)
    if results.setdefault("settings", settings) != settings:
        print(f"{path} was measured with other settings: {results['settings']}; give another --out", file=sys.stderr)
        return 2
    try:
        failed = measure_missing(path, results, jobs, methods, **how)
        for error in failed.values():
            if isinstance(error, Wrong):
                raise error
    except Lost as lost:
        print(f"the GPU was lost, run again for what is left: {lost}", file=sys.stderr)
        return 4
    except Wrong as wrong:
        print(f"wrong output, refused: {wrong}", file=sys.stderr)
        return 1
    for table in show(results):
        table.print()
    for name, error in failed.items():
        print(f"not measured: {name}: {type(error).__name__}: {error}", file=sys.stderr)
    methods_of = (row.get("methods", {}).values() for row in results["rows"].values())
    return 3 if failed or any("failed" in own for each in methods_of for own in each) else 0


def is_lost() -> bool:
    """Return whether an error of a kernel has made the GPU of this process unusable."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _with_bar(names: Sequence[str]) -> Iterator[str]:
    """Yield the names with a bar where rich is installed, and a line each where it is not."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for index, name in enumerate(names, start=1):
            print(f"{index}/{len(names)} {name}", file=sys.stderr, flush=True)
            yield name
        return
    console = Console(stderr=True)
    for name in track(names, "rows", console=console):
        console.print(name, highlight=False)
        yield name

"""Rows that are measured once and kept, and the one way in which the benchmarks of speed are run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Threads that spin while they wait halve the speed of whatever else runs on the machine. The variable is read as torch
# is loaded; scripts that measure speed do that before, and spin.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pages import Table

from cskv.evaluation.environment import environment
from cskv.files import write_text

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tinymodel" / "checkpoint"
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
Jobs = Mapping[str, Callable[[], Row]]
Show = Callable[[dict[str, Any]], Sequence[Table]]
Sizes = tuple[Sequence[int], Sequence[int]]  # lengths and batches


class Wrong(Exception):
    """A method's output is not what it should be: nothing may be reported."""


def read_results(path: Path) -> dict[str, Any]:
    """Return the results kept so far, or none: `rows` by name, and what else a benchmark keeps."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, atomically."""
    write_text(path, json.dumps(results, indent=1, sort_keys=True) + "\n")


def measure_missing(path: Path, results: dict[str, Any], jobs: Jobs, methods: Collection[str] = ()) -> None:
    """Measure the rows that `results` lacks, or that lack one of `methods`, and write the file after each."""
    rows, asked = results["rows"], set(methods)
    todo = [name for name in jobs if name not in rows or not asked <= set(rows[name].get("methods", asked))]
    if todo:
        results["environment"] = environment().to_dict()
    for name in _with_bar(todo) if todo else ():
        rows[name] = jobs[name]()
        write_results(path, results)


def run(path: Path, settings: Row, jobs: Jobs, show: Show, methods: Collection[str] = ()) -> int:
    """Measure what a file of the same settings lacks, rows or `methods` of a row, and print what `show` makes of it.

    A job raises `Wrong` if an output is. The exit code is returned.
    """
    results = read_results(path)
    if results.setdefault("settings", settings) != settings:
        print(f"{path} was measured with other settings: {results['settings']}; give another --out", file=sys.stderr)
        return 2
    try:
        measure_missing(path, results, jobs, methods)
    except Wrong as wrong:
        print(f"wrong output, refused: {wrong}", file=sys.stderr)
        return 1
    for table in show(results):
        table.print()
    return 0


def parser(doc: str | None, quick: str, methods: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark of speed; `quick` says what `--quick` does.

    Given `methods`, it also takes which of them are run, where, how, and on what cells.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--out", type=Path, help="the results file; what it holds is not measured again")
    if methods:
        made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        made.add_argument("--backend", default="auto", help="what attends to latents: auto, triton, torch, reference")
        made.add_argument("--threads", type=int, help="of PyTorch; all cores when not given")
        made.add_argument("--methods", nargs="+", default=methods, choices=methods, metavar="METHOD")
        made.add_argument("--lengths", type=int, nargs="+", help="cached tokens of each sequence")
        made.add_argument("--batches", type=int, nargs="+", help="sequences")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None, script: str, **sizes: Sizes) -> Any:
    """Parse the arguments of a benchmark with methods. `cells` takes (batch, tokens), `out` the results file.

    Lengths and batch sizes that were not given are those of `sizes`, "quick" or "whole".
    """
    asked = made.parse_args(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    lengths, batches = sizes["quick" if asked.quick else "whole"]
    asked.cells = [(batch, tokens) for batch in asked.batches or batches for tokens in asked.lengths or lengths]
    asked.out = asked.out or (ROOT / "outputs" / f"{script}-quick.json" if asked.quick else RESULTS / f"{script}.json")
    return asked


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

"""The one way in which benchmarks of speed are run.

    python -m benchmarks.speed decode            # measures what results/decode.json lacks, then prints tables
    python -m benchmarks.speed decode --quick    # small cells and few repeats, into outputs/
    python -m benchmarks.speed decode --help     # its options
    python -m benchmarks.speed report [FOLDER]   # the tables, figures and goals of a folder of results, into docs/

Nothing wrong is timed: methods are compared with what they should compute first, and if one is off nothing is reported
and the exit code is 1. It is 2 where nothing can be measured, 3 if some rows failed, and 4 if a kernel made the GPU
unusable: then run it again, for the others.
"""

from __future__ import annotations

import importlib
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, read_results, run
from benchmarks.speed.registry import BENCHMARKS, Unavailable

REPORT = "report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing of one benchmark and print its tables, or write the pages. The exit code is returned."""
    first, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    width = max(map(len, BENCHMARKS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, what in BENCHMARKS.items())
    chooser = _parser("python -m benchmarks.speed", f"{__doc__}\nbenchmarks:\n{listed}")
    chooser.add_argument("benchmark", choices=[*BENCHMARKS, REPORT], metavar="NAME")
    name = chooser.parse_args([first]).benchmark
    module = importlib.import_module(f"benchmarks.speed.{name}")
    try:
        return report(module, rest) if name == REPORT else measure(name, module, rest)
    except Unavailable as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2


def measure(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Measure what is missing of a benchmark, and print its tables."""
    asked = parse(name, module, arguments)
    asked.lost = read_results(asked.out).get("lost", [])
    settings, jobs = module.BENCHMARK.plan(asked)
    how = {"seconds": asked.seconds, "keep_going": asked.keep_going}
    return run(asked.out, settings, jobs, module.BENCHMARK.tables, asked.methods, **how)


def parse(name: str, module: ModuleType, arguments: Sequence[str]) -> Any:
    """Parse a benchmark's arguments: `cells` takes (batch, tokens), `methods` names in their order, `out` the file."""
    benchmark = module.BENCHMARK
    made = _parser(f"python -m benchmarks.speed {name}", module.__doc__)
    made.set_defaults(methods=(), lengths=None, batches=None)
    made.add_argument("--quick", action="store_true", help=benchmark.quick)
    made.add_argument("--out", type=Path, help="the results file; what it holds is not measured again")
    made.add_argument("--threads", type=int, help="of PyTorch; all cores when not given")
    made.add_argument("--seconds", type=float, default=math.inf, help="after which no further row is begun")
    made.add_argument("--keep-going", action="store_true", help="a row that fails does not end the run")
    known = (*benchmark.methods, *benchmark.gpu_methods)
    if benchmark.methods:
        made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        made.add_argument(
            "--backend", default="auto", help="what attends to latents: auto, triton, cpu, torch, reference"
        )
        choices = {
            "choices": known,
            "metavar": "METHOD",
            "help": ", ".join(known).replace("%", "%%"),
        }
        made.add_argument("--methods", nargs="+", **choices)
    if benchmark.whole[0]:
        made.add_argument("--lengths", type=int, nargs="+", help="cached tokens of each sequence")
        made.add_argument("--batches", type=int, nargs="+", help="sequences")
    for option, how in benchmark.options.items():
        made.add_argument(option, **how)
    asked = made.parse_args(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    lengths, batches = benchmark.small if asked.quick else benchmark.whole
    asked.cells = [(batch, tokens) for batch in asked.batches or batches for tokens in asked.lengths or lengths]
    chosen = getattr(asked, "methods", None) or (known if getattr(asked, "device", "") == "cuda" else benchmark.methods)
    asked.methods = [name for name in known if name in (*benchmark.baselines, *chosen)]
    asked.out = asked.out or (ROOT / "outputs" / f"{name}-quick.json" if asked.quick else RESULTS / f"{name}.json")
    return asked


def report(module: ModuleType, arguments: Sequence[str]) -> int:
    """Write the pages from a folder of results."""
    made = _parser(f"python -m benchmarks.speed {REPORT}", module.__doc__)
    made.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of results")
    for table in module.write_pages(made.parse_args(arguments).folder):
        table.print()
    return 0


def _parser(prog: str, description: str | None) -> ArgumentParser:
    return ArgumentParser(prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter)

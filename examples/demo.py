"""CSKV end to end on the bundled model: `make demo`, or `python examples/demo.py --help`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

# OpenMP threads that spin while they wait make everything ten times slower as soon as another program takes a core.
# The variable is read when torch is loaded, hence before the imports below.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from cskv.cli.common import command, emit, progress
from cskv.cli.outputs import check_writable

ROOT = Path(__file__).resolve().parent.parent


@command
def main(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")] = str(ROOT / "tinymodel" / "checkpoint"),
    lines: Annotated[int, typer.Option(help="Lines in a LongEval record.")] = 200,
    cases: Annotated[int, typer.Option(help="LongEval questions for each row of the table.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the calibration and training text.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for adapters, figures and results.")] = ROOT / "outputs" / "demo",
) -> None:
    """Calibrate, factorise, train, save, reload, generate, and print one table. The last line is JSON."""
    from demo.run import run_demo, summary
    from demo.settings import DemoSettings, fast_dtype

    from cskv.cli.loading import load_model, load_tokenizer

    check_writable(out / "results.json")
    settings = DemoSettings(num_lines=lines, cases=cases, seed=seed)
    loaded = load_model(model, dtype=fast_dtype())
    emit(summary(run_demo(loaded, load_tokenizer(model), out, settings, progress("{task.fields[note]}")), out))


if __name__ == "__main__":
    typer.run(main)

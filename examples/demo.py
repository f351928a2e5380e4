"""CSKV end to end on a real language model: `make demo`, or `python examples/demo.py --help`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

# OpenMP threads that spin while they wait make everything ten times slower as soon as another program takes a core.
# The variable is read when torch is loaded, hence before the imports below.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from cskv.cli.common import command, console, emit, say, set_logging
from cskv.cli.outputs import check_writable

ROOT = Path(__file__).resolve().parent.parent


@command
def main(
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id. [default: SmolLM2-135M, fetched into models/smollm2]")
    ] = None,
    cases: Annotated[int, typer.Option(help="Needles to find for each row of the table.")] = 8,
    seed: Annotated[int, typer.Option(help="Of calibration text, needles and held-out text.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for adapters, results and the figure.")] = ROOT / "outputs" / "demo",
) -> None:
    """Calibrate, choose, save, reload, generate side by side, and print one table. The last line is JSON.

    What is written is a result file of `cskv evaluate`, of which `cskv report` makes a page.
    """
    from demo.model import fast_dtype, find_model
    from demo.run import Demo
    from demo.settings import DemoSettings

    from cskv.cli.loading import load_model, load_tokenizer

    set_logging("WARNING")
    check_writable(out / "results.json")
    introduction = f"model: {model}"
    if model is None:
        with console().status("fetching SmolLM2-135M, some 100 MB"):
            model, introduction = find_model()
    say(introduction)
    settings = DemoSettings.of(model, cases=cases, seed=seed)
    demo = Demo(load_model(model, dtype=fast_dtype()), load_tokenizer(model), settings, out, console())
    emit(demo.run())


if __name__ == "__main__":
    typer.run(main)

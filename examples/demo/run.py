"""The demo's steps in order, with progress."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.attachment.attach import attach
from cskv.evaluation.environment import environment
from cskv.fingerprint import fingerprint
from cskv.plots import plot_demo, plot_training
from cskv.training.log import FILE as TRAINING_LOG
from demo.adapters import Workshop
from demo.measure import example, material, measure
from demo.report import example_panel, results_table
from demo.settings import EXAMPLE, VARIANTS, DemoSettings
from demo.workspace import Workspace


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    settings: DemoSettings,
    progress: Progress,
) -> dict[str, Any]:
    """Calibrate, factorise, train, save, reload, measure and print; return what `results.json` holds.

    An interrupted run goes on where it stopped when it is started again with the same model and settings; a completed
    one begins anew.

    Args:
        model: a causal language model, nothing attached.
        tokenizer: its own.
        out: the folder to write; see `Workspace`.
        settings: how much is measured.
        progress: shows the bars, with the task field "note"; the table is printed to its console.

    Raises:
        CSKVError: the model cannot be compressed, the text is too short, or the folder cannot be written.
    """
    began = time.perf_counter()
    facts = {
        "model": fingerprint(model.named_parameters()),
        "name": str(model.config.name_or_path),
        "settings": settings.to_dict(),
    }
    workspace, console = Workspace(Path(out), facts), progress.console
    if workspace.resumed:
        console.print(f"going on with the interrupted run in {out}")
    workshop = Workshop(model, tokenizer, settings, workspace)
    with progress:
        _make_adapters(workshop, progress)
        on = material(tokenizer, settings)
        rows = []
        for variant in VARIANTS:
            task = progress.add_task(f"measure {variant.name}", total=on.work, note="")
            row = workspace.row(variant.key)
            if row is None:
                with attach(model, workshop.load(variant.key)) if variant.is_compressed else nullcontext():
                    advance = lambda units, task=task: progress.update(task, advance=units)  # noqa: E731 (short)
                    row = measure(model, tokenizer, variant, settings, on, advance)
                workspace.write(f"rows/{variant.key}.json", row)
            progress.update(task, completed=on.work)
            rows.append(row)
    made = example(next(row for row in rows if row["key"] == EXAMPLE), on)
    where, seconds = environment().to_dict(), time.perf_counter() - began
    results = {**facts, "environment": where, "seconds": seconds, "rows": rows, "example": made}
    _draw(rows, workspace)
    workspace.write("results.json", results)
    console.print(example_panel(made))
    console.print(results_table(rows, where, seconds))
    console.print(f"written: {workspace.path('results.json')}, demo.png, training.png, adapters/")
    return results


def summary(results: dict[str, Any], out: str | Path) -> dict[str, Any]:
    """Return the results without their details, for the last line."""
    rows = [{name: value for name, value in row.items() if name != "details"} for row in results["rows"]]
    return {"rows": rows, "seconds": results["seconds"], "results": str(Path(out) / "results.json")}


def _make_adapters(workshop: Workshop, progress: Progress) -> None:
    settings = workshop.settings
    task = progress.add_task("calibrate", total=settings.calibration_samples, note="")
    statistics = workshop.statistics(lambda done: progress.update(task, completed=done))
    progress.update(task, completed=settings.calibration_samples)
    for variant in (variant for variant in VARIANTS if variant.is_compressed):
        steps = settings.train_samples // settings.train_batch_size if variant.trained else 1
        task = progress.add_task(f"make {variant.name}", total=steps, note="")

        def on_step(step: int, loss: float | None, task: Any = task) -> None:
            progress.update(task, completed=step, note=f"loss {loss:.4g}")

        workshop.make(variant, statistics, on_step)
        progress.update(task, completed=steps)


def _draw(rows: list[dict[str, Any]], workspace: Workspace) -> None:
    plot_demo(rows, workspace.path("demo.png"))
    trained = [variant for variant in VARIANTS if variant.trained]
    logs = [workspace.path("training", variant.key, TRAINING_LOG) for variant in trained]
    plot_training(logs, workspace.path("training.png"), [variant.name for variant in trained])

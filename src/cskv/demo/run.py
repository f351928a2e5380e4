"""The demo's steps in order, with progress."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.attach import attach
from cskv.demo.adapters import calibration, make_adapter
from cskv.demo.measure import Example, Material, example, material, measure
from cskv.demo.report import example_panel, results_table
from cskv.demo.settings import EXAMPLE, VARIANTS, DemoSettings, Variant
from cskv.demo.workspace import Workspace
from cskv.evaluation.environment import environment
from cskv.fingerprint import fingerprint
from cskv.plots import plot_demo, plot_training
from cskv.training.log import FILE as TRAINING_LOG


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    settings: DemoSettings,
    console: Console,
) -> dict[str, Any]:
    """Calibrate, factorise, train, save, reload, measure and print; return what `results.json` holds.

    An interrupted run goes on where it stopped when it is started again with the same model and settings; a completed
    one begins anew.

    Args:
        model: a causal language model, nothing attached.
        tokenizer: its own.
        out: the folder to write; see `Workspace`.
        settings: how much is measured.
        console: where the table is printed, and the progress bars on the terminal.

    Raises:
        CSKVError: the model cannot be compressed, the text is too short, or the folder cannot be written.
    """
    began = time.perf_counter()
    facts = {
        "model": fingerprint(model.named_parameters()),
        "name": str(model.config.name_or_path),
        "settings": settings.to_dict(),
    }
    workspace = Workspace(Path(out), facts)
    if workspace.resumed:
        console.print(f"going on with the interrupted run in {out}")
    with _progress(console) as progress:
        _make_adapters(model, tokenizer, settings, workspace, progress)
        on = material(tokenizer, settings)
        rows = [_row(model, tokenizer, variant, settings, workspace, on, progress) for variant in VARIANTS]
    made = _example(model, tokenizer, workspace, on)
    results = {**facts, "environment": environment().to_dict(), "seconds": time.perf_counter() - began}
    results |= {"rows": rows, "example": asdict(made)}
    _finish(results, made, workspace, console)
    return results


def summary(results: dict[str, Any], out: str | Path) -> dict[str, Any]:
    """The results without their details, for the last line."""
    rows = [{name: value for name, value in row.items() if name != "details"} for row in results["rows"]]
    return {"rows": rows, "seconds": results["seconds"], "results": str(Path(out) / "results.json")}


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def _make_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
    workspace: Workspace,
    progress: Progress,
) -> None:
    task = progress.add_task("calibrate", total=settings.calibration_samples, note="")
    statistics = calibration(model, tokenizer, settings, workspace, lambda done: progress.update(task, completed=done))
    progress.update(task, completed=settings.calibration_samples)
    for variant in VARIANTS:
        if not variant.is_compressed:
            continue
        steps = settings.train_samples // settings.train_batch_size if variant.trained else 1
        task = progress.add_task(f"make {variant.name}", total=steps, note="")

        def on_step(step: int, loss: float | None, task: Any = task) -> None:
            progress.update(task, completed=step, note=f"loss {loss:.4g}")

        make_adapter(model, tokenizer, variant, statistics, settings, workspace, on_step)
        progress.update(task, completed=steps)


def _row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variant: Variant,
    settings: DemoSettings,
    workspace: Workspace,
    on: Material,
    progress: Progress,
) -> dict[str, Any]:
    """Measure one variant with its adapter loaded from disk, or take the figures of the interrupted run."""
    task = progress.add_task(f"measure {variant.name}", total=on.work, note="")
    row = workspace.row(variant.key)
    if row is None:
        with attach(model, _load(workspace, variant.key)) if variant.is_compressed else nullcontext():
            row = measure(model, tokenizer, variant, settings, on, lambda units: progress.update(task, advance=units))
        workspace.write(f"rows/{variant.key}.json", row)
    progress.update(task, completed=on.work)
    return row


def _load(workspace: Workspace, key: str) -> CSKVAdapter:
    return CSKVAdapter.from_pretrained(workspace.path("adapters", key))


def _example(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, workspace: Workspace, on: Material) -> Example:
    with attach(model, _load(workspace, EXAMPLE)):
        return example(model, tokenizer, on)


def _finish(results: dict[str, Any], made: Example, workspace: Workspace, console: Console) -> None:
    rows = results["rows"]
    plot_demo(rows, workspace.path("demo.png"))
    trained = [variant for variant in VARIANTS if variant.trained]
    logs = [workspace.path("training", variant.key, TRAINING_LOG) for variant in trained]
    plot_training(logs, workspace.path("training.png"), [variant.name for variant in trained])
    workspace.write("results.json", results)
    console.print(example_panel(made))
    console.print(results_table(rows, results["environment"], results["seconds"]))
    console.print(f"written: {workspace.path('results.json')}, demo.png, training.png, adapters/")

"""A progress bar with the loss and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cskv.training.log import StepRecord


@contextmanager
def progress_bar(total_steps: int, first_step: int = 0) -> Iterator[Callable[[StepRecord], None]]:
    """Show a bar on standard error; yields what to call after each step."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=total_steps, completed=first_step, loss="-")
        yield lambda record: bar.update(task, completed=record.step, loss=f"{record.loss:.4g}")

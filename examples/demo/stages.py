"""What a person sees of the work: a bar while a stage runs, where there is a terminal, and a line when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

NAME = "{:<30}"


@dataclass
class Stage:
    """A stage under way.

    Attributes:
        note: what its line is to say behind the seconds.
    """

    bar: Progress
    task: TaskID
    note: str = ""

    def advance(self, share: float) -> None:
        """Count a share of the stage as done."""
        self.bar.update(self.task, total=1.0, advance=share)


@contextmanager
def stage(console: Console, name: str) -> Iterator[Stage]:
    """Show a stage while its block runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    began = time.perf_counter()
    with bar:
        task = bar.add_task(NAME.format(name), total=None)  # pulses until a share is done
        yield (shown := Stage(bar, task))
    line = f"{NAME.format(name)}{time.perf_counter() - began:6.1f} s  {shown.note}"
    console.print(escape(line.rstrip()), soft_wrap=True)

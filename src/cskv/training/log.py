"""Reports of a training run: a progress bar, and a log, `train_log.jsonl`, of one JSON object a line to plot.

{"step": 1, "loss": 0.31, "k_loss": 0.2, "v_loss": 0.11, "lr": 5e-05, "tokens": 1024, "seconds": 0.8}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cskv.errors import CSKVError
from cskv.files import write_text, writing_to

FILE = "train_log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step.

    Attributes:
        step: counted from 1.
        loss: k_loss + v_loss, or the KL divergence in nats per token; before the step's update.
        k_loss, v_loss: summed over layers, averaged over the step's tokens; None in distillation.
        lr: the learning rate used.
        tokens: seen so far by all processes.
        seconds: spent training so far, over all sessions of the run.
    """

    step: int
    loss: float
    k_loss: float | None
    v_loss: float | None
    lr: float
    tokens: int
    seconds: float


class TrainingLog:
    """Appends records; lines after `last_step`, which a resumed run will write again, are dropped first.

    Raises:
        CSKVError: the file cannot be written.
    """

    def __init__(self, output: Path, last_step: int) -> None:
        self.path = output / FILE
        kept = (line for line, record in _records(self.path) if record.step <= last_step)
        write_text(self.path, "".join(kept))

    def append(self, record: StepRecord) -> None:
        """Write one line, at once: a person may be watching.

        Raises:
            CSKVError: the disk is full, for instance.
        """
        with writing_to(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def read_log(path: str | Path) -> list[StepRecord]:
    """Read the records of a log file; none where it is absent. A last line left unfinished by a kill is skipped.

    Raises:
        CSKVError: a line is no record.
    """
    return [record for _, record in _records(Path(path))]


def _records(path: Path) -> Iterator[tuple[str, StepRecord]]:
    """Yield every whole line and its record."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("}\n"):
            continue
        try:
            record = StepRecord(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise CSKVError(f"{path} has a line that is no record of a step ({error}); delete the file") from error
        if type(record.step) is not int:
            raise CSKVError(f"{path} has step {record.step!r}; expected a whole number: delete the file")
        yield line, record


@contextmanager
def progress_bar(total_steps: int, first_step: int = 0) -> Iterator[Callable[[StepRecord], None]]:
    """Show a bar on standard error; yields what to call after each step."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=total_steps, completed=first_step, loss="-")
        yield lambda record: bar.update(task, completed=record.step, loss=f"{record.loss:.4g}")

"""The training log: one JSON object a line, in `train_log.jsonl`, for a person to plot.

{"step": 1, "loss": 0.31, "k_loss": 0.2, "v_loss": 0.11, "lr": 5e-05, "tokens": 1024, "seconds": 0.8}
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from cskv.errors import CSKVError
from cskv.files import unwritable, write_text

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
        write_text(self.path, "".join(_lines_until(self.path, last_step)))
        try:
            self._file: IO[str] = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def append(self, record: StepRecord) -> None:
        """Write one line, at once: a person may be watching.

        Raises:
            CSKVError: the disk is full, for instance.
        """
        try:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # it tries again to write what `append` could not, and said so
            self._file.close()


def read_log(path: str | Path) -> list[StepRecord]:
    """Read the records of a log file; none where it is absent. A last line left unfinished by a kill is skipped.

    Raises:
        CSKVError: a line is no record.
    """
    return [_record(Path(path), line) for line in _whole_lines(Path(path))]


def _record(path: Path, line: str) -> StepRecord:
    try:
        record = StepRecord(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise CSKVError(f"{path} has a line that is no record of a step ({error}); delete the file") from error
    if type(record.step) is not int:
        raise CSKVError(f"{path} has step {record.step!r}; expected a whole number: delete the file")
    return record


def _lines_until(path: Path, last_step: int) -> list[str]:
    return [line for line in _whole_lines(path) if _record(path, line).step <= last_step]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]

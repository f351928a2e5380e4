from pathlib import Path

import pytest

from cskv.errors import CSKVError
from cskv.training.log import StepRecord, TrainingLog, read_log


def record(step: int) -> StepRecord:
    return StepRecord(step, 0.3, 0.1, 0.2, 5e-5, step * 16, step * 0.5)


def test_records_come_back(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "new", 0)
    log.append(record(1))
    assert read_log(log.path) == [record(1)], "a person may be watching"
    log.append(record(2))
    assert read_log(log.path) == [record(1), record(2)]


def test_a_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    for step in range(1, 6):
        log.append(record(step))
    with log.path.open("a") as file:
        file.write('{"step": 6, "loss": 0.')  # killed in the middle of a line
    assert [r.step for r in read_log(log.path)] == [1, 2, 3, 4, 5]
    log = TrainingLog(tmp_path, 3)
    for step in range(4, 8):
        log.append(record(step))
    assert [r.step for r in read_log(log.path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_from_the_start_begins_a_new_log(tmp_path: Path) -> None:
    TrainingLog(tmp_path, 0).append(record(1))
    assert read_log(TrainingLog(tmp_path, 0).path) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CSKVError, match="cannot write"):
        TrainingLog(tmp_path / "file", 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(CSKVError, match=r"cannot write .*\.jsonl: No space left on device; free some space there"):
        log.append(record(1))

import dataclasses
import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from cskv.adapter.base_model import BaseModelInfo, Signature
from cskv.errors import AdapterError, CSKVError
from cskv.training.checkpoint import Checkpoints, TrainingState, load_optimizer_tensors, optimizer_tensors
from tests.disk import disk_full

BASE = BaseModelInfo("some/model", "llama", 16, 2)
STATE = TrainingState(step=3, tokens=48, seconds=1.5, k_loss=0.25, v_loss=0.5)


def trained(steps: int = 3) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    advance(module, optimizer, steps)
    return module, optimizer


def advance(module: nn.Linear, optimizer: torch.optim.AdamW, steps: int) -> None:
    for i in range(steps):
        module(torch.full((1, 3), 1.0 + i)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def fresh() -> tuple[nn.Linear, torch.optim.AdamW]:
    module = nn.Linear(3, 2)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    module, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, {"seed": 1}, BASE)
    with checkpoints.prepared():
        checkpoints.save(module, optimizer, STATE)
    other, other_optimizer = fresh()
    assert Checkpoints(tmp_path, {"seed": 1}, BASE).restore(other, other_optimizer) == STATE
    for m, o in ((module, optimizer), (other, other_optimizer)):
        advance(m, o, 4)
    assert torch.equal(module.weight, other.weight)
    assert torch.equal(module.bias, other.bias)


def test_optimizer_state_has_readable_names() -> None:
    tensors = optimizer_tensors(*trained())
    assert sorted(tensors) == [f"{p}.{k}" for p in ("bias", "weight") for k in ("exp_avg", "exp_avg_sq", "step")]
    assert tensors["weight.step"] == 3
    module, optimizer = fresh()
    load_optimizer_tensors(module, optimizer, tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in optimizer_tensors(module, optimizer).items())


def test_only_the_newest_stays_and_nothing_is_pickled(tmp_path: Path) -> None:
    module, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, {}, BASE)
    with checkpoints.prepared():
        for step in (3, 20, 100_000_000):
            checkpoints.save(module, optimizer, dataclasses.replace(STATE, step=step))
    files = sorted(str(path.relative_to(tmp_path)) for path in checkpoints.folder.rglob("*") if path.is_file())
    folder = "checkpoints/step-100000000"
    assert files == [f"{folder}/{n}" for n in ("factors.safetensors", "optimizer.safetensors", "state.json")]


@pytest.mark.parametrize("file", ["factors.safetensors", "optimizer.safetensors", "state.json"])
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    module, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, {}, BASE)
    with checkpoints.prepared():
        checkpoints.save(module, optimizer, STATE)
        with monkeypatch.context() as patch:
            disk_full(patch, file)
            with pytest.raises(CSKVError, match="cannot write .* [Nn]o space left on device.*free some space there"):
                checkpoints.save(module, optimizer, dataclasses.replace(STATE, step=4))
        assert checkpoints.restore(*fresh()).step == 3
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000003"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {}, BASE)
    (tmp_path / "checkpoints" / ".step-00000004.abc" / "new").mkdir(parents=True)
    with checkpoints.prepared():
        assert list(checkpoints.folder.iterdir()) == []


def test_an_older_checkpoint_that_a_killed_run_had_yet_to_remove_is_removed(tmp_path: Path) -> None:
    """The last step's checkpoint may be whole by then, so that no other one is ever written."""
    checkpoints = Checkpoints(tmp_path, {}, BASE)
    with checkpoints.prepared():
        checkpoints.save(*trained(), STATE)
    (checkpoints.folder / "step-00000002").mkdir()
    with checkpoints.prepared():
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000003"]
        assert checkpoints.restore(*fresh()) == STATE


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first, second = Checkpoints(tmp_path, {}, BASE), Checkpoints(tmp_path, {}, BASE)
    with first.prepared():
        with pytest.raises(CSKVError, match="another training run is at work in .*; wait for its end, or choose"):
            second.prepared().__enter__()
        with Checkpoints(tmp_path / "elsewhere", {}, BASE).prepared():
            pass
    with second.prepared():
        pass


def test_a_killed_run_leaves_the_folder_free(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with Checkpoints(tmp_path, {}, BASE).prepared():
            os.write(writing, b".")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    with pytest.raises(CSKVError, match="another training run"):
        Checkpoints(tmp_path, {}, BASE).prepared().__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Checkpoints(tmp_path, {}, BASE).prepared():
        pass


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_handle: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("cskv.training.checkpoint._lock_exclusively", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), Checkpoints(tmp_path, {}, BASE).prepared():
        pass


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    def of(*numbers: float) -> BaseModelInfo:
        signature = Signature(False, {"0": {"k": list(numbers), "v": list(numbers)}})
        return dataclasses.replace(BASE, signature=signature)

    with Checkpoints(tmp_path, {}, of(1.0, -2.0)).prepared():
        Checkpoints(tmp_path, {}, of(1.0, -2.0)).save(*trained(), STATE)
    assert Checkpoints(tmp_path, {}, of(1.001, -2.001)).restore(*fresh()) == STATE  # as bf16 rounds
    with pytest.raises(AdapterError, match="was written for some/model, whose key and value weights differ"):
        Checkpoints(tmp_path, {}, of(1.1, -2.1)).restore(*fresh())


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"learning_rate": 0.1, "epochs": 1}, BASE)
    with checkpoints.prepared():
        checkpoints.save(*trained(), STATE)
    with pytest.raises(
        CSKVError, match=r"learning_rate 0\.1 \(now 0\.2\); continue with the same settings, or"
    ) as caught:
        Checkpoints(tmp_path, {"learning_rate": 0.2, "epochs": 1}, BASE).restore(*fresh())
    assert "epochs" not in str(caught.value)


@pytest.mark.parametrize("name", ["factors.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, {}, BASE)
    with checkpoints.prepared():
        checkpoints.save(*trained(), STATE)
    path = tmp_path / "checkpoints" / "step-00000003" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CSKVError, match="step-00000003 is damaged .* delete it to start again"):
        checkpoints.restore(*fresh())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CSKVError, match="choose a writable folder"):
        Checkpoints(tmp_path / "file", {}, BASE).prepared().__enter__()

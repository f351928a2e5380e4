import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from cskv.errors import CSKVError
from cskv.training.checkpoint import Checkpoints, Progress, load_optimizer_tensors, optimizer_tensors

PROGRESS = Progress(step=3, tokens=48, seconds=1.5, k_loss=0.25, v_loss=0.5)


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
    checkpoints = Checkpoints(tmp_path, {"seed": 1})
    checkpoints.prepare()
    checkpoints.save(module, optimizer, PROGRESS)
    other, other_optimizer = fresh()
    assert Checkpoints(tmp_path, {"seed": 1}).restore(other, other_optimizer) == PROGRESS
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
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.prepare()
    for step in (3, 20, 100_000_000):
        checkpoints.save(module, optimizer, dataclasses.replace(PROGRESS, step=step))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    folder = "checkpoints/step-100000000"
    assert files == [f"{folder}/{n}" for n in ("factors.safetensors", "optimizer.safetensors", "state.json")]


def test_a_failed_write_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.prepare()
    checkpoints.save(module, optimizer, PROGRESS)

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cskv.training.checkpoint.write_text", full)
    with pytest.raises(CSKVError, match="cannot write checkpoint .* No space left"):
        checkpoints.save(module, optimizer, dataclasses.replace(PROGRESS, step=4))
    assert checkpoints.restore(*fresh()).step == 3
    assert len(list(checkpoints.folder.iterdir())) == 2
    checkpoints.prepare()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000003"]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"learning_rate": 0.1, "epochs": 1})
    checkpoints.prepare()
    checkpoints.save(*trained(), PROGRESS)
    with pytest.raises(
        CSKVError, match=r"learning_rate 0\.1 \(now 0\.2\); continue with the same settings, or"
    ) as caught:
        Checkpoints(tmp_path, {"learning_rate": 0.2, "epochs": 1}).restore(*fresh())
    assert "epochs" not in str(caught.value)


@pytest.mark.parametrize("name", ["factors.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.prepare()
    checkpoints.save(*trained(), PROGRESS)
    path = tmp_path / "checkpoints" / "step-00000003" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CSKVError, match="step-00000003 is damaged .* delete it to start again"):
        checkpoints.restore(*fresh())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CSKVError, match="choose a writable folder"):
        Checkpoints(tmp_path / "file", {}).prepare()

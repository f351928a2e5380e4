"""Checkpoints of a training run: folders that are either whole or absent.

    checkpoints/step-00000200/
        factors.safetensors     the adapter's parameters, fp32
        optimizer.safetensors   AdamW's state, {parameter}.{exp_avg | exp_avg_sq | step}
        state.json              the step, tokens and seconds so far, the last losses, and what the run was started with

A checkpoint is written under a hidden name, flushed, and renamed; only then are older ones removed. There is no random
state: samples are a function of the step, and nothing else is drawn.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cskv.errors import CSKVError
from cskv.files import write_tensors, write_text

FOLDER = "checkpoints"
FACTORS_FILE = "factors.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        tokens: tokens seen by all processes.
        seconds: time spent training, over all sessions.
        loss, k_loss, v_loss: of the last step; None before the first, and the latter two in distillation.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    k_loss: float | None = None
    v_loss: float | None = None


class Checkpoints:
    """The checkpoints of one output folder.

    Args:
        output: the run's folder.
        facts: what the run is started with; a checkpoint of other facts is not continued.
    """

    def __init__(self, output: Path, facts: dict[str, Any]) -> None:
        self.folder = output / FOLDER
        self.facts = facts

    def prepare(self) -> None:
        """Make the folder and clear what an interrupted write left.

        Raises:
            CSKVError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise CSKVError(
                f"cannot write {self.folder}: {error.strerror or error}; choose a writable folder"
            ) from error

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint, then remove the older ones.

        Raises:
            CSKVError: the folder cannot be written.
        """
        target = self.folder / f"step-{progress.step:08d}"
        if target.exists():
            return
        try:
            temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{target.name}."))
            write_tensors(temporary / FACTORS_FILE, dict(module.named_parameters()))
            write_tensors(temporary / OPTIMIZER_FILE, optimizer_tensors(module, optimizer))
            write_text(
                temporary / STATE_FILE, json.dumps({"progress": asdict(progress), "facts": self.facts}, indent=2)
            )
            _flush_folder(temporary)
            temporary.rename(target)
            _flush_folder(self.folder)
            for older in self.folder.glob("step-*"):
                if older != target:
                    shutil.rmtree(older)
        except OSError as error:
            raise CSKVError(f"cannot write checkpoint {target}: {error.strerror or error}; free space there") from error

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest checkpoint into a run, or nothing where there is none.

        Raises:
            CSKVError: the checkpoint is damaged, or belongs to a run with other settings; the message says which.
        """
        path = self.latest()
        if path is None:
            return Progress()
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            factors, moments = load_file(path / FACTORS_FILE), load_file(path / OPTIMIZER_FILE)
            progress = Progress(**state["progress"])
            self._refuse_other_facts(path, state["facts"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, CSKVError):
                raise
            raise CSKVError(f"checkpoint {path} is damaged ({error}); delete it to start again") from error
        _load_factors(module, factors, path)
        load_optimizer_tensors(module, optimizer, moments)
        return progress

    def _refuse_other_facts(self, path: Path, theirs: dict[str, Any]) -> None:
        names = sorted(set(theirs) | set(self.facts))
        differing = [
            f"{name} {theirs.get(name)!r} (now {self.facts.get(name)!r})"
            for name in names
            if theirs.get(name) != self.facts.get(name)
        ]
        if differing:
            raise CSKVError(
                f"{path} was written with {', '.join(differing)}; continue with the same settings, "
                f"or start anew in another output folder or after deleting {self.folder}"
            )


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's per-parameter state as named tensors."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, for an optimiser over the module's parameters in their order."""
    index = {name: i for i, (name, _) in enumerate(module.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        state.setdefault(index[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _load_factors(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    parameters = dict(module.named_parameters())
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CSKVError(f"the factors in checkpoint {path} have other names or shapes than this run's; delete it")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _flush_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

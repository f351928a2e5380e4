"""Checkpoints of a training run: folders that are either whole or absent.

    checkpoints/step-00000200/
        factors.safetensors     the adapter's parameters, fp32
        optimizer.safetensors   AdamW's state, {parameter}.{exp_avg | exp_avg_sq | step}
        state.json              the step, tokens and seconds so far, the last losses, and what the run was started with

A checkpoint is written under a hidden name, flushed, and renamed; only then are older ones removed. There is no random
state: samples are a function of the step, and nothing else is drawn. A second run in the same folder would mix its log
and checkpoints with the first one's, so a run holds a lock, which the system takes back when the process ends.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cskv.adapter.base_model import BaseModelInfo
from cskv.errors import CSKVError
from cskv.files import tensors_writer, text_writer, write_folder, writing_to

FOLDER = "checkpoints"
FACTORS_FILE = "factors.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
LOCK_FILE = ".train.lock"


@dataclass(frozen=True)
class TrainingState:
    """The progress of a run.

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
        base: the model that it is run on; a checkpoint of other weights is not continued.
    """

    def __init__(self, output: Path, facts: dict[str, Any], base: BaseModelInfo) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.facts = facts
        self.base = base

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Make the folder, clear what an interrupted write left, and keep other runs out of it inside the block.

        Raises:
            CSKVError: the folder cannot be written, or another run is at work in it.
        """
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.output / LOCK_FILE).open("ab")
        with lock:
            self._lock(lock.fileno())
            with writing_to(self.folder):
                for leftover in self.folder.glob(".step-*"):
                    shutil.rmtree(leftover)
                tempfile.TemporaryFile(dir=self.folder).close()
            self._remove_older()
            yield

    def _lock(self, handle: int) -> None:
        try:
            _lock_exclusively(handle)
        except (BlockingIOError, PermissionError) as error:
            raise CSKVError(
                f"another training run is at work in {self.output}; wait for its end, or choose another output folder"
            ) from error
        except OSError as error:
            warnings.warn(f"{self.output} cannot be locked ({error}): start no second run there", stacklevel=2)

    def latest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Write a checkpoint, then remove the older ones.

        Raises:
            CSKVError: the folder cannot be written; the older checkpoint stays.
        """
        target = self.folder / f"step-{state.step:08d}"
        if target.exists():
            return
        described = {"progress": asdict(state), "facts": self.facts, "base": asdict(self.base)}

        def fill(folder: Path) -> None:
            tensors_writer(dict(module.named_parameters()))(folder / FACTORS_FILE)
            tensors_writer(optimizer_tensors(module, optimizer))(folder / OPTIMIZER_FILE)
            text_writer(json.dumps(described, indent=2))(folder / STATE_FILE)

        write_folder(target, fill)
        self._remove_older()

    def _remove_older(self) -> None:
        """Remove all but the newest checkpoint."""
        for older in sorted(self.folder.glob("step-*"))[:-1]:
            shutil.rmtree(older, ignore_errors=True)

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Load the newest checkpoint into a run, or nothing where there is none.

        Raises:
            CSKVError: the checkpoint is damaged, or belongs to a run with other settings; the message says which.
        """
        path = self.latest()
        if path is None:
            return TrainingState()
        try:
            described = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            factors, moments = load_file(path / FACTORS_FILE), load_file(path / OPTIMIZER_FILE)
            state = TrainingState(**described["progress"])
            self._refuse_other_facts(path, described["facts"])
            if "base" in described:  # not in checkpoints of an older cskv
                BaseModelInfo.from_dict(described["base"]).check_weights(
                    self.base, f"checkpoint {path} was written for", f"load that, or delete {self.folder}"
                )
        except CSKVError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CSKVError(f"checkpoint {path} is damaged ({error}); delete it to start again") from error
        if {n: t.shape for n, t in factors.items()} != {n: p.shape for n, p in module.named_parameters()}:
            raise CSKVError(f"the factors in checkpoint {path} have other names or shapes than this run's; delete it")
        module.load_state_dict(factors, strict=False)  # biases are no parameters, and not in it
        load_optimizer_tensors(module, optimizer, moments)
        return state

    def _refuse_other_facts(self, path: Path, theirs: dict[str, Any]) -> None:
        differing = [
            f"{name} {theirs.get(name)!r} (now {self.facts.get(name)!r})"
            for name in sorted(theirs.keys() | self.facts.keys())
            if theirs.get(name) != self.facts.get(name)
        ]
        if differing:
            raise CSKVError(
                f"{path} was written with {', '.join(differing)}; continue with the same settings, "
                f"or start anew in another output folder or after deleting {self.folder}"
            )


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's per-parameter state as named tensors."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Invert `optimizer_tensors`, for an optimiser over the module's parameters in their order."""
    index = {name: i for i, (name, _) in enumerate(module.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        state.setdefault(index[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _lock_exclusively(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

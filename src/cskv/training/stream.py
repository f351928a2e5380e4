"""The samples of an optimiser step of one process, as a function of the step alone.

Step t uses samples [t * n, (t + 1) * n) of the epochs laid end to end, n = processes * accumulation * batch_size,
dealt out to forwards first and to processes within a forward. So p processes see the same samples per step as one
process with p times the accumulation, and a resumed run goes on where it was. An epoch's last samples that do not
fill a step are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from cskv.errors import DataError
from cskv.training.settings import TrainingSettings


class Samples(Protocol):
    """Token samples, each (tokens,) int64, that can be iterated again: a list of tensors, or `TokenSamples`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Int[Tensor, " tokens"]]: ...


class SampleStream:
    """The batches of one process.

    Args:
        samples: all samples of an epoch.
        settings: batch size, accumulation, epochs, max_steps.
        rank, processes: which process of how many.

    Raises:
        DataError: there are too few samples for one step.
    """

    def __init__(self, samples: Samples, settings: TrainingSettings, rank: int = 0, processes: int = 1) -> None:
        self.samples = samples
        self.batch_size = settings.batch_size
        self.rank = rank
        self.group = processes * settings.batch_size
        self.per_step = self.group * settings.accumulation
        self.steps_per_epoch = len(samples) // self.per_step
        if self.steps_per_epoch == 0:
            raise DataError(
                f"there are {len(samples)} training samples; one step needs {self.per_step} ({processes} processes x "
                f"accumulation {settings.accumulation} x batch size {self.batch_size}): give more, or lower these"
            )
        self.total_steps = self.steps_per_epoch * settings.epochs
        if settings.max_steps is not None:
            self.total_steps = min(self.total_steps, settings.max_steps)

    def batches(self, start_step: int) -> Iterator[Int[Tensor, "batch tokens"]]:
        """Yield this process's batches from a step on, `accumulation` of them per step, without end."""
        order = self._order(start_step)
        while True:
            group = list(islice(order, self.group))
            mine = group[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            if len({sample.shape for sample in mine}) > 1:
                raise DataError(f"samples of a batch have {[len(s) for s in mine]} tokens; expected equal lengths")
            yield torch.stack(mine)

    def fingerprint(self) -> str:
        """Hash the number of samples and the first one's tokens: what tells this set from another one."""
        first = next(iter(self.samples)).cpu().to(torch.int64).numpy().tobytes()
        return hashlib.sha256(first + str(len(self.samples)).encode()).hexdigest()[:16]

    def _order(self, start_step: int) -> Iterator[Int[Tensor, " tokens"]]:
        usable = self.steps_per_epoch * self.per_step
        skip = start_step % self.steps_per_epoch * self.per_step
        while True:
            starting_at = getattr(self.samples, "starting_at", None)
            rest = starting_at(skip) if starting_at is not None else islice(self.samples, skip, None)
            yield from islice(rest, usable - skip)
            skip = 0

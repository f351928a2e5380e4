"""Training of a compressor: only down- and up-projections learn, the base is frozen.

With the paper's objective (section 3.2), each step runs the base model once without gradients, takes every layer's
input and exact keys and values, and does one forward and backward of the compressor; with distillation, the gradient
comes through the model. AdamW; fp32 master weights. On several processes (torchrun, accelerate launch) each one has
the whole base and its own samples, and gradients are averaged.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.adapter.base_model import FACTS
from cskv.calibration.hooks import Teacher
from cskv.errors import ConfigError, CSKVError
from cskv.models.placement import device_of
from cskv.models.survey import survey
from cskv.training.checkpoint import Checkpoints, TrainingState
from cskv.training.log import StepRecord, TrainingLog, progress_bar
from cskv.training.objective import Distillation, Reconstruction
from cskv.training.settings import TrainingSettings
from cskv.training.stream import Samples, SampleStream

OnStep = Callable[[StepRecord], None]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class TrainingResult(TrainingState):
    """The outcome of a run. The adapter itself was trained in place.

    Attributes:
        resumed_from: the step that this session began at.
    """

    resumed_from: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.step


def train(
    model: nn.Module,
    adapter: CSKVAdapter,
    samples: Samples,
    settings: TrainingSettings | None = None,
    *,
    output: str | Path | None = None,
    show_progress: bool = False,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train an adapter's factors in place, to rebuild the model's keys and values or to keep its predictions.

    With an output folder the run keeps checkpoints and a log there. Started again with the same arguments it continues
    from the last checkpoint, and ends with the same factors, bit for bit, as if it had never stopped (same machine and
    same number of processes). A run that is complete already only loads its result. Ctrl-C and SIGTERM finish the step
    and save first.

    Args:
        model: the base model, where it is to run. Its weights, mode and hooks are left as they were.
        adapter: from `initialise`; its factors become fp32 and move to the model's device.
        samples: token samples; needs `len` and must give the same ones when iterated again.
        settings: the paper's where None.
        output: folder for `checkpoints/` and `train_log.jsonl`; None keeps nothing. All processes must see it.
        show_progress: a bar on standard error, on the first process.
        on_step: called after each step, on the first process.

    Raises:
        AdapterError: the adapter belongs to another model.
        ConfigError: reconstruction of commuting key factors.
        DataError: too few samples, or samples of unequal length in one batch.
        CSKVError: the loss is not finite (checkpoints stay as they were), or the output folder cannot be written, holds
            a run with other settings, or has another run at work in it.
    """
    run = _Run(model, adapter, samples, settings or TrainingSettings(), None if output is None else Path(output))
    return run.execute(show_progress, on_step)


class _Run:
    def __init__(
        self, model: nn.Module, adapter: CSKVAdapter, samples: Samples, settings: TrainingSettings, output: Path | None
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        found = survey(model)
        adapter.check_fits(found)
        if settings.objective == "reconstruction" and adapter.config.key_factors == "commuting":
            raise ConfigError(
                "commuting key factors are not trained by reconstruction, whose minimum they are already; "
                "give objective 'distillation'"
            )
        self.settings, self.output, self.adapter = settings, output, adapter
        self.accelerator = Accelerator(
            cpu=device_of(model).type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.is_writer = self.accelerator.is_main_process
        self.stream = SampleStream(samples, settings, self.accelerator.process_index, self.accelerator.num_processes)
        adapter.to(self.accelerator.device, torch.float32)
        for parameter in adapter.parameters():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            adapter.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=self.accelerator.device.type in ("cpu", "cuda"),
        )
        self.objective: Distillation | Reconstruction
        self.teacher: Distillation | Teacher
        if settings.objective == "distillation":
            self.objective = self.teacher = Distillation(found, adapter, checkpointed=settings.gradient_checkpointing)
        else:
            self.objective = Reconstruction(adapter, bf16=settings.mixed_precision == "bf16")
            self.teacher = Teacher(model, found.sites)
        self.module = self.accelerator.prepare(self.objective)
        self.checkpoints = None if output is None else Checkpoints(output, self._facts(), found.base)

    def execute(self, show_progress: bool, on_step: OnStep | None) -> TrainingResult:
        total = self.stream.total_steps
        with ExitStack() as stack:
            start = state = self._restore(stack)
            callbacks = [] if on_step is None or not self.is_writer else [on_step]
            if self.output is not None and self.is_writer:
                callbacks.append(TrainingLog(self.output, start.step).append)
            if show_progress and self.is_writer:
                callbacks.append(stack.enter_context(progress_bar(total, start.step)))
            interruption = stack.enter_context(Interruption())
            stack.enter_context(self.teacher.watching())
            batches = self.stream.batches(start.step)
            began = time.perf_counter() - start.seconds
            for step in range(start.step, total):
                record = self._step(step, batches, state.tokens, began)
                losses = (record.loss, record.k_loss, record.v_loss)
                state = TrainingState(record.step, record.tokens, record.seconds, *losses)
                for callback in callbacks:
                    callback(record)
                stopping = self._any_process(interruption.signal is not None)
                due = stopping or record.step % self.settings.checkpoint_every == 0 or record.step == total
                if due and self.checkpoints is not None and self.is_writer:
                    self.checkpoints.save(self.adapter, self.optimizer, state)
                if stopping:
                    stack.close()
                    interruption.deliver()
                    raise KeyboardInterrupt(f"another process was stopped at step {record.step}")
        self.accelerator.wait_for_everyone()
        if state.loss is None:
            raise CSKVError("the run has no steps; give at least one")
        return TrainingResult(**asdict(state), resumed_from=start.step)

    def _step(self, step: int, batches: Iterator[Tensor], tokens: int, began: float) -> StepRecord:
        accumulation = self.settings.accumulation
        lr = self.settings.learning_rate_at(step, self.stream.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(len(self.objective.parts), device=self.accelerator.device)
        seen = 0
        for i in range(accumulation):
            batch = next(batches)
            last = i == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                parts = self.module(self.teacher.observe(batch))
                self.accelerator.backward(parts.sum() / accumulation)
            losses += parts.detach() / accumulation
            seen += batch.numel()
        means = self.accelerator.reduce(losses, "mean").tolist()
        parts_now = dict(zip(self.objective.parts, means, strict=True))
        loss = sum(parts_now.values())
        if not math.isfinite(loss):
            self._refuse_loss(step + 1, parts_now)
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens += seen * self.accelerator.num_processes
        seconds = time.perf_counter() - began
        return StepRecord(step + 1, loss, parts_now.get("k_loss"), parts_now.get("v_loss"), lr, tokens, seconds)

    def _any_process(self, flag: bool) -> bool:
        """Signals reach processes between different steps; all of them must stop after the same one."""
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def _refuse_loss(self, step: int, parts: dict[str, float]) -> None:
        latest = None if self.checkpoints is None else self.checkpoints.latest()
        kept = "" if latest is None else f"; the last checkpoint, {latest}, is intact"
        raise CSKVError(
            f"the loss is not finite at step {step} ({parts}): lower the learning rate, now "
            f"{self.settings.learning_rate}, or run the base model in bf16 or fp32{kept}"
        )

    def _facts(self) -> dict[str, Any]:
        """Collect what must be equal for a checkpoint to be continued: all that has a say in the numbers."""
        facts = {**self.settings.to_dict(), **self.adapter.config.to_dict()}
        del facts["checkpoint_every"]
        facts |= {name: getattr(self.adapter.base, name) for name in FACTS}
        return facts | {"samples": self.stream.fingerprint(), "processes": self.accelerator.num_processes}

    def _restore(self, stack: ExitStack) -> TrainingState:
        if self.checkpoints is None:
            return TrainingState()
        if self.is_writer:
            stack.enter_context(self.checkpoints.prepared())
        self.accelerator.wait_for_everyone()
        return self.checkpoints.restore(self.adapter, self.optimizer)


class Interruption:
    """Ctrl-C and SIGTERM: inside the block a first signal is only noted; a second one acts at once.

    Handlers belong to the main thread; elsewhere signals keep their meaning and nothing is ever noted.

    Attributes:
        signal: the signal noted, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        self._restore()

    def deliver(self) -> None:
        """Hand the noted signal to whoever handled it before: KeyboardInterrupt, or the end of the process."""
        self._restore()
        if self.signal is not None:
            signal.raise_signal(self.signal)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        else:
            self.deliver()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

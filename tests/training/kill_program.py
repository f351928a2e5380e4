"""Trains in forked children that are killed at random moments, then to the end; prints what came of it as JSON.

A fork starts in milliseconds, where a new interpreter would take seconds to import torch: so many kills are cheap.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cskv.training.log import StepRecord, read_log
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train
from tests.training.tiny import factors_of, tiny_model, token_samples, untrained

SETTINGS = TrainingSettings(learning_rate=1e-2, schedule="cosine", epochs=4, checkpoint_every=2)


def run(
    output: Path | None, on_step: Callable[[StepRecord], None] | None = None
) -> tuple[dict[str, torch.Tensor], int]:
    model = tiny_model()
    adapter = untrained(model)
    result = train(model, adapter, token_samples(20), SETTINGS, output=output, on_step=on_step)
    return factors_of(adapter), result.resumed_from


def killed_run(output: Path, after_seconds: float) -> bool:
    """Kill a child so long after its first step; True if it was not done yet."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        run(output, lambda _record: os.write(writing, b"."))
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    time.sleep(after_seconds)
    os.kill(child, signal.SIGKILL)
    os.close(reading)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(output: Path, seed: int) -> None:
    torch.set_num_threads(1)
    straight, _ = run(None)
    moments = random.Random(seed)
    kills = sum(killed_run(output, moments.uniform(0.0, 0.1)) for _ in range(8))
    resumed, resumed_from = run(output)
    print(
        json.dumps(
            {
                "kills": kills,
                "resumed_from": resumed_from,
                "identical": all(torch.equal(resumed[name], straight[name]) for name in straight),
                "steps": [record.step for record in read_log(output / "train_log.jsonl")],
                "left": sorted(path.name for path in (output / "checkpoints").iterdir()),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

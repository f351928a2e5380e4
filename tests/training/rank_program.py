"""Run by torchrun: trains on as many processes as it is started with, and lets the first save its factors."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train
from tests.training.tiny import factors_of, tiny_model, token_samples, untrained


def main(output: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    model = tiny_model()
    adapter = untrained(model)
    settings = TrainingSettings(learning_rate=1e-2, epochs=epochs, checkpoint_every=2, max_grad_norm=0.5)
    train(model, adapter, token_samples(7), settings, output=output)
    state = PartialState()
    save_file(factors_of(adapter), output / f"rank-{state.process_index}-of-{state.num_processes}.safetensors")
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

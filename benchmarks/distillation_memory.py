"""Peak memory of one distillation step over 4096 tokens, with and without gradient checkpointing.

    python benchmarks/distillation_memory.py

Each step runs in a process of its own, on a random Llama of 16 layers, hidden size 512, 8 kv heads of 64 channels and a
vocabulary of 32000; the figure is the growth of the process's peak resident memory over the step.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from pages import Table

TOKENS, LAYERS = 4096, 16
MIB = 1024  # ru_maxrss counts KiB


def step(checkpointed: bool) -> dict[str, float]:
    """One forward and backward; MiB and seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cskv.compression.initialise import initialise
    from cskv.config import CSKVConfig
    from cskv.models.survey import survey
    from cskv.reading.divergence import Divergence

    torch.manual_seed(0)
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=1408, **shape)).requires_grad_(False)
    adapter = initialise(model, CSKVConfig(0.2, 0.2, init="svd"))
    divergence = Divergence(survey(model))
    tokens = torch.randint(0, 32000, (1, TOKENS))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    divergence.kl(adapter, tokens, checkpointed=checkpointed).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"mib": peak / MIB, "seconds": time.perf_counter() - began}


def main(one: Annotated[str, typer.Option("--one", help="Run one step here: plain or checkpointed.")] = "") -> None:
    """Print the table."""
    if one:
        print(json.dumps(step(one == "checkpointed")))
        return
    cells = []
    for name in ("plain", "checkpointed"):
        out = subprocess.run([sys.executable, __file__, "--one", name], check=True, capture_output=True, text=True)
        figures = json.loads(out.stdout.splitlines()[-1])
        cells.append((name, f"{figures['mib']:.0f}", f"{figures['seconds']:.0f}"))
    Table(f"Distillation, {TOKENS} tokens, {LAYERS} layers", ("backward pass", "peak, MiB", "seconds"), cells).print()


if __name__ == "__main__":
    typer.run(main)

"""Peak memory of one distillation step over 4096 tokens, with and without gradient checkpointing.

Each step runs in a process of its own, on a random Llama of 16 layers, hidden size 512, 8 kv heads of 64 channels and a
vocabulary of 32000; the figure is the growth of the process's peak resident memory over the step.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from functools import partial
from typing import Any

import torch

from benchmarks.common import Jobs, Row
from benchmarks.pages import Table
from benchmarks.speed.registry import Benchmark

STEPS = {"plain": False, "checkpointed": True}
MIB = 1024  # ru_maxrss counts KiB


def step(checkpointed: bool, tokens: int, layers: int) -> Row:
    """Make one forward and backward; MiB and seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cskv.compression.initialise import initialise
    from cskv.config import CSKVConfig
    from cskv.models.survey import survey
    from cskv.reading.divergence import Divergence

    torch.manual_seed(0)
    shape = {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=1408, **shape)).requires_grad_(False)
    adapter = initialise(model, CSKVConfig(0.2, 0.2, init="svd"))
    divergence = Divergence(survey(model))
    text = torch.randint(0, 32000, (1, tokens))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    divergence.kl(adapter, text, checkpointed=checkpointed).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"mib": peak / MIB, "seconds": time.perf_counter() - began}


def measure(*arguments: Any) -> Row:
    """Run `step` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(step, arguments)


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings and a job per step."""
    settings = {"tokens": 512, "layers": 2} if asked.quick else {"tokens": 4096, "layers": 16}
    jobs = {name: partial(measure, checkpointed, *settings.values()) for name, checkpointed in STEPS.items()}
    return settings | {"threads": torch.get_num_threads()}, jobs


def tables(results: dict[str, Any]) -> list[Table]:
    """Show both steps."""
    title = "Distillation, {tokens} tokens, {layers} layers".format(**results["settings"])
    cells = [(name, f"{row['mib']:.0f}", f"{row['seconds']:.0f}") for name, row in results["rows"].items()]
    return [Table(title, ("backward pass", "peak, MiB", "seconds"), cells)]


BENCHMARK = Benchmark(plan, tables, "512 tokens, 2 layers")

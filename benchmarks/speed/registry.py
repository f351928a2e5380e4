"""The benchmarks of speed by name, and what each gives the runner.

To add one, write a module of its name with a `BENCHMARK`, and a line in `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import Jobs, Row, Show

# Modules of this folder, which are loaded when they are asked for: not every environment has what all of them need.
BENCHMARKS: Mapping[str, str] = {
    "decode": "one layer's decode step on compressed, uncompressed and quantised caches",
    "levels": "the attention call on a CPU: by each level of instructions, by torch, and by torch.compile",
    "models": "SmolLM2-135M and Qwen2.5-Coder-1.5B on real prompts: tokens per second, by cache",
    "generation": "greedy decoding end to end: tokens per second after a real prefill",
    "graph": "the same of Llamas of 8B's and 1B's shape by CUDA graphs (GPU)",
    "paged": "one layer's decode attention on latents in pages, beside vLLM's (GPU)",
    "serving": "decoding in vLLM, at equal batch and at equal memory",
    "memory": "peak memory of one distillation step, with and without gradient checkpointing",
    "resources": "registers, spills and shared memory of the Triton kernels for Hopper, by its assembler (no GPU)",
    "gpu": "the Triton kernels: other plans than those that are made, a profile (GPU)",
}
Sizes = tuple[Sequence[int], Sequence[int]]  # lengths and batches


class Unavailable(Exception):
    """This benchmark or method cannot be measured here, and why."""


@dataclass(frozen=True)
class Benchmark:
    """What the runner needs of a benchmark.

    Attributes:
        plan: of the parsed arguments, the settings that all rows of a file share, and the jobs by the names of their
            rows. A job raises `Wrong` if an output is. `Unavailable` where nothing can be measured.
        tables: of results, what is printed.
        quick: what `--quick` does.
        whole, small: lengths and batch sizes, and those of `--quick`; none of a benchmark without such cells.
        methods: names of what is compared in a row; none of a benchmark that compares nothing.
        gpu_methods: further ones, which are measured where they are asked for and on a GPU.
        baselines: those that are measured whatever is asked for.
        options: of its own, as argparse takes them.
    """

    plan: Callable[[Any], tuple[Row, Jobs]]
    tables: Show
    quick: str
    whole: Sizes = ((), ())
    small: Sizes = ((), ())
    methods: Sequence[str] = ()
    gpu_methods: Sequence[str] = ()
    baselines: Sequence[str] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

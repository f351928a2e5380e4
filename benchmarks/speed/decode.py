"""One layer's decode step on a compressed cache, against uncompressed and quantised ones, in one run.

A step appends one token and attends; methods take turns. On a GPU the attention call alone is timed too, and what a
copy moves. Before a method is timed its output is compared with a plain softmax in fp32 over the keys and values that
it means; if one is wrong nothing is reported.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Jobs, Lost, Row, Wrong, is_lost
from benchmarks.speed.methods import BEST, SDPA, Method, methods, on_a_gpu
from benchmarks.speed.problem import KINDS, PER_HEAD, Problem, Shape
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.tables import COPY, decode_tables
from benchmarks.speed.timing import Call, Stopwatch, Turns, copy_bandwidth, free_bytes, summary, take_turns, time_calls
from cskv.attention.cpu.library import library

SHAPE = Shape()
GPU_SHAPE = Shape(density=192 / 1024)  # whole blocks of 8 latents, in 8 groups too: 16 bytes at a time
# Root mean square of the error, as a share of the output's: rounding of keys, weights and values in each dtype.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-4}
LARGEST_DEVIATION = 0.5  # of any method, 4 bits too, from attention to the exact keys and values
TINY = Shape(8, 8, 16, density=0.5)
CACHES = 8  # uncompressed caches that all methods of a row and what they make in a step fit in


def measure(tokens: int, batch: int, asked: Any) -> Row:
    """Measure a row: all methods at one length and batch size; raise `Wrong` if a method's output is."""
    row: Row = {"tokens": tokens, "batch": batch}
    if reason := too_large(tokens * batch, asked.shape, asked.dtype, asked.device):
        return row | {"skipped": reason}
    turns = Turns(0.05, least=2, most=4) if asked.quick else Turns(asked.budget)
    if asked.tiny:
        turns = Turns(0.0, least=1, most=1)
    with torch.inference_mode():
        ready, row["methods"] = set_up(tokens, batch, asked)
        stopwatch, steps = Stopwatch(asked.device), {name: method.step for name, method in ready.items()}
        for name, seconds in take_turns(steps, stopwatch, turns).items():
            method, own = ready[name], row["methods"][name]
            own |= {"seconds": summary(seconds), "nbytes": method.nbytes(), "read_nbytes": method.read_nbytes()}
            if method.scratch is not None:
                own["workspace_nbytes"] = method.scratch.nbytes()
        if (
            asked.device.type == "cuda" or asked.tiny
        ):  # last: a step may move the scratch tensors that a graph was captured with
            for name, found in time_calls(calls(ready), stopwatch, turns).items():
                row["methods"][name] |= found
    del ready, steps, method
    gc.collect()
    if asked.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def calls(ready: Mapping[str, Method]) -> dict[str, Call]:
    """Return the attention call alone of the methods that have one."""
    return {name: method.call() for name, method in ready.items() if method.call is not None}


def too_large(tokens: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Say why a row of so many tokens in all does not fit in memory; "" where it does."""
    needed, free = CACHES * 2 * shape.kv_dim * dtype.itemsize * tokens, free_bytes(device)
    return "" if needed <= free else f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"


def set_up(tokens: int, batch: int, asked: Any) -> tuple[dict[str, Method], dict[str, Row]]:
    """Return the methods, ready and checked, and what is known of each; skipped ones are only in the latter.

    Where a run keeps going, so are those that fail.
    """
    known, ready, rows = methods(asked.backend) | on_a_gpu(asked.backend), {}, {}
    for kind in (*KINDS, PER_HEAD):
        names = [name for name in asked.methods if known[name][0] == kind]
        if not names:
            continue
        problem = Problem(kind, asked.shape, tokens, batch, asked.dtype, asked.device)
        truth = problem.truth()
        for name in names:
            if name in getattr(asked, "lost", ()):
                rows[name] = {"failed": "it lost the GPU"}
                continue
            try:
                method = known[name][1](problem)
                rows[name] = check(name, method, problem, truth) | ({"note": method.note} if method.note else {})
                ready[name] = method
            except Unavailable as reason:
                rows[name] = {"skipped": str(reason)}
            except Exception as error:
                if not getattr(asked, "keep_going", False):
                    raise
                traceback.print_exc(limit=-4)
                rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                if is_lost():
                    raise Lost(name) from error
        problem.forget()
    return {name: ready[name] for name in asked.methods if name in ready}, rows


def check(name: str, method: Method, problem: Problem, truth: Tensor) -> Row:
    """Compare the first step with one softmax in fp32 over what the method reads, for the last sequence of the batch.

    It raises `Wrong` if that is further off than rounding explains, or few bits do.
    """
    output = method.step()
    if not method.is_checked:
        return {}
    read = method.represented()
    expected = truth if read is None else problem.softmax(*read)
    error, deviation = (relative_error(output[-1, :, 0], other) for other in (expected, truth))
    most = tolerance(problem.dtype, problem.device)
    if not error <= most or not deviation <= LARGEST_DEVIATION:
        raise Wrong(
            f"{name} at {problem.tokens} tokens, batch {problem.batch}: error {error:.3g} against a softmax in fp32 "
            f"(at most {most:g}), {deviation:.3g} against the exact cache (at most {LARGEST_DEVIATION:g})"
        )
    return {"error": error, "deviation": deviation}


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest error that rounding explains. A GPU may multiply fp32 as TF32, whose precision is fp16's."""
    return TOLERANCE[torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype]


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of that of what is expected."""
    return float((output.float() - expected).norm() / expected.norm())


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, a job for the bandwidth of a copy, and one per length and batch size."""
    settings = resolve(asked, TINY if asked.tiny else GPU_SHAPE if asked.device == "cuda" else SHAPE)
    cells = asked.cells
    if asked.device.type == "cuda":  # the goals' lengths first
        cells = sorted(cells, key=lambda cell: (-cell[1], cell[0]))
    jobs: Jobs = {f"{batch} x {tokens}": partial(measure, tokens, batch, asked) for batch, tokens in cells}
    size = 2**20 if asked.tiny or asked.quick else 2**30 if asked.device.type == "cuda" else 2**28
    copy = {COPY: partial(copy_bandwidth, asked.device, size)}
    return settings, copy | jobs if asked.device.type == "cuda" or asked.tiny else jobs | copy


def resolve(asked: Any, shape: Shape) -> Row:
    """Turn names into what they name, take a layer in, and return the settings that rows of one file share."""
    name, device = asked.dtype, torch.device(asked.device)
    asked.shape, asked.dtype, asked.device = shape, getattr(torch, name), device
    kernels = {"kernels": cpu_kernels()} if device.type == "cpu" else {}
    return {"shape": asdict(shape), "dtype": name, "device": device.type, "threads": torch.get_num_threads()} | kernels


def cpu_kernels() -> str:
    """Return the level of instructions of the compiled kernels, or that there are none."""
    loaded = library()
    return "none" if loaded is None else loaded.name


OPTIONS: dict[str, dict[str, Any]] = {
    "--dtype": {"choices": ("bfloat16", "float16", "float32"), "default": "bfloat16"},
    "--tiny": {"action": "store_true", "help": "a layer of 8 query and 8 kv heads of 16 channels, to rehearse"},
    "--budget": {"type": float, "default": 0.4, "help": "seconds of timing per method and row"},
}
BENCHMARK = Benchmark(
    plan,
    decode_tables,
    "1K and 2K tokens, batch 1 and 4, a few repeats",
    whole=(tuple(1024 * 2**i for i in range(7)), (1, 4, 16)),
    small=((1024, 2048), (1, 4)),
    methods=tuple(methods()),
    gpu_methods=tuple(on_a_gpu()),
    baselines=(SDPA, BEST),
    options=OPTIONS,
)

"""The attention call of one layer on a CPU: by the compiled kernels at every level of instructions, and by torch.

Torch's ways are the backend that a machine without the kernels has, as it is and compiled by torch.compile, whose C++
needs a compiler wherever it runs. All take turns on the same caches; outputs are compared with the reference first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Jobs, Row, Wrong
from benchmarks.pages import Table
from benchmarks.speed.decode import SHAPE, TOLERANCE, cpu_kernels, relative_error
from benchmarks.speed.methods import best_uncompressed
from benchmarks.speed.problem import GROUP, WINDOW, Problem
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.timing import Stopwatch, Turns, summary, take_turns
from cskv.attention import reference
from cskv.attention.attend import attention
from cskv.attention.cpu import launch
from cskv.attention.cpu.library import LEVELS, library
from cskv.attention.inputs import AttentionInputs
from cskv.cache.bibranch import BiBranchStore
from cskv.scratch import Scratch

TOKENS = 16_384
COMPILED, TORCH, BEST = "torch.compile", "torch", "best uncompressed"
METHODS = [(kind, bits) for kind in ("joint", "grouped", "commuting") for bits in (16, 4)]


def ways(query: Tensor, inputs: AttentionInputs) -> dict[str, Callable[[], Tensor]]:
    """Return every way to attend to one cache, by name."""
    loaded = library()
    if loaded is None:
        raise Unavailable("the compiled CPU kernels are not installed")
    compiled = torch.compile(partial(attention, backend="torch", scratch=Scratch()), dynamic=False, fullgraph=True)
    scratch = Scratch()
    found = {
        name: partial(launch.attention, query, inputs, scratch, replace(loaded, level=LEVELS.index(name)))
        for name in loaded.usable
    }
    by_torch = partial(attention, query, inputs, backend="torch", scratch=Scratch())
    return found | {TORCH: by_torch, COMPILED: partial(compiled, query, inputs)}


def measure(kind: str, bits: int, tokens: int, budget: float) -> Row:
    """Measure a row: one kind of keys in so many bits, by all ways; raise `Wrong` if one's output is."""
    problem = Problem(kind, SHAPE, tokens, 1, torch.bfloat16, torch.device("cpu"))
    store = BiBranchStore(WINDOW, GROUP, *problem.grids(bits))
    store.append(*problem.cached)
    best = best_uncompressed(problem)
    problem.forget()
    with torch.inference_mode():
        inputs = problem.inputs(store.append(*problem.new))
        calls = ways(problem.query, inputs)
        truth = reference.attention(problem.query, inputs)
        for name, call in calls.items():
            error = relative_error(call(), truth)
            if not error <= TOLERANCE[torch.bfloat16]:
                raise Wrong(f"{kind}, {bits} bits by {name}: {error:.3g} off the reference")
        calls[BEST] = best.call()  # type: ignore[misc]
        seconds = take_turns(calls, Stopwatch(problem.device), Turns(budget))
    return {"kind": kind, "bits": bits, "tokens": tokens, "ways": {n: summary(own) for n, own in seconds.items()}}


def tables(results: dict[str, Any]) -> list[Table]:
    """Show how many times as fast as the best uncompressed attention every way is."""
    rows = list(results["rows"].values())
    names = [name for name in (*LEVELS, TORCH, COMPILED) if any(name in row["ways"] for row in rows)]

    def show(row: Row, name: str) -> str:
        return f"{row['ways'][BEST]['median'] / row['ways'][name]['median']:.2f}x" if name in row["ways"] else ""

    lines = [(name, *(show(row, name) for row in rows)) for name in names]
    heads = ("by", *(f"{row['kind']}, {row['bits']} bits" for row in rows))
    title = f"The attention call at {rows[0]['tokens']} tokens, batch 1: times as fast as the best uncompressed one"
    return [Table(title, heads, lines)]


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings and a job per kind of keys and bits."""
    tokens = 1024 if asked.quick else TOKENS
    jobs = {f"{kind}, {bits} bits": partial(measure, kind, bits, tokens, asked.budget) for kind, bits in METHODS}
    return {"tokens": tokens, "threads": torch.get_num_threads(), "kernels": cpu_kernels()}, jobs


OPTIONS = {"--budget": {"type": float, "default": 1.0, "help": "seconds of timing per way"}}
BENCHMARK = Benchmark(plan, tables, "1,024 tokens", options=OPTIONS)

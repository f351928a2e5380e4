"""The Triton kernels on a GPU at 64K tokens: other plans than those that are made, and what a step spends its time in.

The profile is written beside the results, into profile.txt.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import Jobs, Row
from benchmarks.pages import Table
from benchmarks.speed import decode
from benchmarks.speed.methods import BEST, methods, on_a_gpu
from benchmarks.speed.problem import Shape
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.timing import Stopwatch, summary
from cskv.attention.triton import launch
from cskv.attention.triton.plan import LEAST, Plan, Shapes, ranges
from cskv.files import write_text

TINY, TOKENS = Shape(8, 4, 32), 65_536
AS_PLANNED, PROFILE = "as planned", "profile.txt"
PLANNERS = ("plan_scores", "plan_partials")
# Other plans for the Triton kernels than those that `cskv.attention.triton.plan` reasons out; `splits` multiplies.
VARIANTS: tuple[dict[str, int], ...] = (
    {}, {"warps": 4}, {"warps": 8}, {"stages": 3}, {"stages": 1}, {"heads": 1}, {"splits": 2},
    {"tile": 128, "warps": 8},
)  # fmt: skip


def tuning(tokens: int, asked: Any) -> Row:
    """Time the attention call of every method under every plan, each compiled first, while there is time."""
    deadline, stopwatch, found = time.monotonic() + asked.tuning_seconds, Stopwatch(asked.device), {}
    with torch.inference_mode():
        ready = decode.calls(decode.set_up(tokens, 1, asked)[0])
        for variant, (name, call) in itertools.product(VARIANTS, ready.items()):
            if name == BEST:
                continue
            if time.monotonic() > deadline:
                break
            with plans(variant) as used:
                call()
                took = summary([stopwatch.seconds(call) for _ in range(10)])
            label = ", ".join(f"{key} {value}" for key, value in variant.items()) or AS_PLANNED
            found.setdefault(name, {})[label] = took | {"plans": [repr(plan) for plan in dict.fromkeys(used)]}
    return {"plans": found}


@contextmanager
def plans(variant: dict[str, int]) -> Iterator[list[Plan]]:
    """Change every plan that is made in the block, where it has what is changed. The list takes what was planned."""
    planned, used = {name: getattr(launch, name) for name in PLANNERS}, []

    def changed(planner: Callable[[Shapes, int], Plan], shapes: Shapes, multiprocessors: int) -> Plan:
        plan = planner(shapes, multiprocessors)
        direct = {key: value for key, value in variant.items() if key != "splits"}
        if plan.heads == 1:  # of `partials`, or as few as there can be
            direct.pop("heads", None)
        made = replace(plan, **direct)
        if made.heads < plan.heads:
            made = replace(made, rows=max(LEAST, plan.rows * made.heads // plan.heads))
        most = made.splits * variant.get("splits", 1) * plan.heads // made.heads
        used.append(replace(made, splits=ranges(shapes.tokens, made.tile, most)))
        return used[-1]

    for name, planner in planned.items():
        setattr(launch, name, partial(changed, planner))
    try:
        yield used
    finally:
        for name, planner in planned.items():
            setattr(launch, name, planner)


def profile(tokens: int, asked: Any) -> Row:
    """Write the kernels that a step spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    device, texts = asked.device.type, []
    with torch.inference_mode():
        for name, method in decode.set_up(tokens, 1, asked)[0].items():
            method.step()
            with profiled(activities=[getattr(ProfilerActivity, kind) for kind in {"CPU", device.upper()}]) as profiler:
                for _ in range(5):
                    method.step()
            times = profiler.key_averages()
            shown = times.table(sort_by=f"self_{device}_time_total", row_limit=8, max_name_column_width=60)
            texts.append(f"{name}, batch 1, {tokens} tokens, 5 steps\n{shown}")
    write_text(asked.out.with_name(PROFILE), "\n\n".join(texts))
    return {"file": PROFILE}


def tables(results: dict[str, Any]) -> list[Table]:
    """Show the best plan of every method, and what it saves."""
    lines = []
    for name, by_plan in results["rows"].get("plans", {}).get("plans", {}).items():
        best = min(by_plan, key=lambda label: by_plan[label]["median"])
        saved = f"{by_plan[AS_PLANNED]['median'] / by_plan[best]['median']:.2f}x"
        lines.append((name, str(len(by_plan)), best, saved))
    return [Table("Plans of the kernels", ("method", "tried", "fastest", "times as fast as planned"), lines)]


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, a job for plans and one for the profile."""
    if asked.device == "cpu" and not asked.quick:
        raise Unavailable("no GPU; --quick shows that a profile is made")
    settings, tokens = decode.resolve(asked, TINY if asked.quick else decode.GPU_SHAPE), 256 if asked.quick else TOKENS
    jobs: Jobs = {"profile": partial(profile, tokens, asked)}
    if asked.device.type == "cuda" and asked.backend in ("auto", "triton"):
        jobs = {"plans": partial(tuning, tokens, asked), **jobs}
    return settings | {"tokens": tokens}, jobs


SECONDS = {"type": float, "default": 25.0, "help": "for other plans of the Triton kernels"}
BENCHMARK = Benchmark(
    plan,
    tables,
    "a tiny layer and 256 tokens, on a CPU the profile alone",
    methods=tuple(methods()),
    gpu_methods=tuple(on_a_gpu()),
    options=decode.OPTIONS | {"--tuning-seconds": SECONDS},
)

"""The Triton kernels on a GPU at 64K tokens: what an attention call spends its time in, and other plans for them.

The profile is written beside the results too, into profile.txt.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks.common import Jobs, Row
from benchmarks.pages import Table
from benchmarks.speed import decode
from benchmarks.speed.methods import methods, on_a_gpu
from benchmarks.speed.problem import KINDS, PER_HEAD, Shape
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.timing import Call, Stopwatch, summary
from cskv.attention.triton import launch
from cskv.attention.triton.plan import LEAST, Plan, Shapes, ranges
from cskv.files import write_text

TINY, TOKENS = Shape(8, 4, 32), 65_536
AS_PLANNED, PROFILE = "as planned", "profile.txt"
CALLS, KERNELS, SHOWN = 5, 8, 4  # calls of a profile, kernels that are kept of it, and shown
PLANNERS = ("plan_scores", "plan_partials")
# Other plans for the Triton kernels than those that `cskv.attention.triton.plan` reasons out; `splits` multiplies.
VARIANTS: tuple[dict[str, int], ...] = (
    {}, {"warps": 4}, {"warps": 8}, {"stages": 3}, {"stages": 1}, {"heads": 1}, {"splits": 2},
    {"tile": 128, "warps": 8},
)  # fmt: skip


Ready = Callable[[], dict[str, Call]]


def tuning(name: str, variant: dict[str, int], ready: Ready, asked: Any) -> Row:
    """Time the attention call of a method under a plan, compiled first."""
    if name not in ready():
        return {"skipped": "see decode.json"}
    call, stopwatch = ready()[name], Stopwatch(asked.device)
    with torch.inference_mode(), plans(variant) as used:
        call()
        took = summary([stopwatch.seconds(call) for _ in range(asked.repeats)])
    return took | {"method": name, "variant": label(variant), "plans": [repr(plan) for plan in dict.fromkeys(used)]}


def label(variant: dict[str, int]) -> str:
    """Return the name of a variant of a plan."""
    return ", ".join(f"{key} {value}" for key, value in variant.items()) or AS_PLANNED


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


def profile(ready: Ready, asked: Any) -> Row:
    """Return the kernels that a call of every method spends its time in: names, launches, microseconds a call."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    device, found = asked.device.type, {}
    own_time = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    with torch.inference_mode():
        for name, call in ready().items():
            call()
            with profiled(activities=[getattr(ProfilerActivity, kind) for kind in {"CPU", device.upper()}]) as profiler:
                for _ in range(CALLS):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
            times = profiler.key_averages()
            events = [event for event in times if device == "cpu" or event.device_type.name == "CUDA"]
            events.sort(key=lambda event: -getattr(event, own_time))
            found[name] = [[e.key, e.count / CALLS, getattr(e, own_time) / CALLS] for e in events[:KERNELS]]
    write_text(asked.out.with_name(PROFILE), _as_text(found))
    return {"kernels": found}


def _as_text(found: dict[str, list[list[Any]]]) -> str:
    parts = []
    for name, kernels in found.items():
        lines = [f"{microseconds:10.1f} us  {count:5.1f} x  {kernel[:110]}" for kernel, count, microseconds in kernels]
        parts.append("\n".join([f"{name}, a call, batch 1", *lines]))
    return "\n\n".join(parts) + "\n"


def tables(results: dict[str, Any]) -> list[Table]:
    """Show what calls consist of, and the best plan of every method with what it saves."""
    lines, kernels = [], results["rows"].get("profile", {}).get("kernels", {})
    for name, own in kernels.items():
        shown = "; ".join(f"{_short(kernel)} {microseconds:.1f}" for kernel, _, microseconds in own[:SHOWN])
        lines.append((name, f"{sum(microseconds for _, _, microseconds in own):.1f}", shown))
    profiled = Table("Kernels of an attention call, microseconds", ("method", "in all", "kernels"), lines)
    by_method: dict[str, dict[str, float]] = {}
    for row in results["rows"].values():
        if "variant" in row:
            by_method.setdefault(row["method"], {})[row["variant"]] = row["median"]
    lines = []
    for name, by_plan in by_method.items():
        if AS_PLANNED not in by_plan:
            continue
        best = min(by_plan, key=lambda variant: by_plan[variant])
        saved = f"{by_plan[AS_PLANNED] / by_plan[best]:.2f}x"
        lines.append((name, str(len(by_plan)), best, saved))
    return [profiled, Table("Plans of the kernels", ("method", "tried", "fastest", "times as fast as planned"), lines)]


def _short(kernel: str) -> str:
    """Return the name of a function without its namespaces and arguments."""
    words = re.sub(r"<.*|\(.*", "", kernel.removeprefix("void ")).split("::")
    return words[-1][:28] or kernel[:28]


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, a job for the profile and one per plan and method."""
    if asked.device == "cpu" and not asked.quick:
        raise Unavailable("no GPU; --quick shows what would be made")
    settings, tokens = decode.resolve(asked, TINY if asked.quick else decode.GPU_SHAPE), 256 if asked.quick else TOKENS

    @cache
    def ready() -> dict[str, Call]:
        with torch.inference_mode():
            return decode.calls(decode.set_up(tokens, 1, asked)[0])

    jobs: Jobs = {"profile": partial(profile, ready, asked)}
    if asked.device.type == "cuda" or asked.backend == "triton":
        variants = VARIANTS[:2] if asked.quick else VARIANTS
        names = [name for name in asked.methods if name.startswith((*KINDS, PER_HEAD))]
        jobs |= {
            f"{name}, {label(variant)}": partial(tuning, name, variant, ready, asked)
            for variant, name in itertools.product(variants, names)
        }
    return settings | {"tokens": tokens}, jobs


BENCHMARK = Benchmark(
    plan,
    tables,
    "a tiny layer and 256 tokens; on a CPU other plans are tried with --backend triton alone",
    methods=tuple(methods()),
    gpu_methods=tuple(on_a_gpu()),
    options=decode.OPTIONS | {"--repeats": {"type": int, "default": 10, "help": "calls that are timed of a plan"}},
)

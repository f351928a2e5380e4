"""Time other plans for the Triton kernels than those that `cskv.attention.triton.plan` reasons out, as a table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from decode import Settings, set_up
from decode_methods import DENSE, Ours
from decode_timing import Stopwatch, summary

from cskv.attention.triton import launch
from cskv.attention.triton.plan import Plan, Shapes, split

VARIANTS: tuple[dict[str, int], ...] = (
    {},
    {"warps": 4},
    {"warps": 8},
    {"stages": 3},
    {"tile": 32},
    {"tile": 128},
    {"tile": 128, "warps": 8},
    {"value_block": 128},
    {"stages": 1},
    {"splits": 2},
)


def tuning(settings: Settings, batch: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Seconds of the attention call of every method under every plan, until the time is up.

    Args:
        settings: of the benchmark; the backend has to be Triton's.
        batch, tokens: of the cache.
        seconds: after which no further plan is tried. Each is compiled first.
    """
    deadline, stopwatch, found = time.monotonic() + seconds, Stopwatch(settings.device), {}
    with torch.inference_mode():
        ready, _ = set_up(tokens, batch, settings)
        calls = {n: (m, m.append()) for n, m in ready.items() if isinstance(m, Ours) and n != DENSE}
        for variant in VARIANTS:
            for name, (method, view) in calls.items():
                if time.monotonic() > deadline:
                    return found
                with plans(variant) as used:
                    method.attend(view)
                    took = summary([stopwatch.seconds(lambda m=method, v=view: m.attend(v)) for _ in range(10)])
                label = ", ".join(f"{key} {value}" for key, value in variant.items()) or "as planned"
                found.setdefault(name, {})[label] = took | {"plan": repr(used[-1])}
    return found


@contextmanager
def plans(variant: dict[str, int]) -> Iterator[list[Plan]]:
    """Change every plan that is made in the block; `splits` multiplies. The list takes what was planned."""
    planned, used = launch.plan, []

    def changed(shapes: Shapes, multiprocessors: int) -> Plan:
        plan = planned(shapes, multiprocessors)
        direct = {key: value for key, value in variant.items() if key != "splits"}
        used.append(split(replace(plan, **direct), shapes.tokens, plan.splits * variant.get("splits", 1)))
        return used[-1]

    launch.plan = changed
    try:
        yield used
    finally:
        launch.plan = planned


def fastest(found: dict[str, Any]) -> list[str]:
    """One line per method: the best plan, and what it saves."""
    lines = []
    for name, by_plan in found.items():
        best = min(by_plan, key=lambda label: by_plan[label]["median"])
        ratio = by_plan["as planned"]["median"] / by_plan[best]["median"]
        lines.append(f"{name}: {best} is the fastest of {len(by_plan)} plans, {ratio:.2f}x as planned")
    return lines

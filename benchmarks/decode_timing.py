"""Timing of steps that take turns, and what is made of the seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FLUSH = 2**28  # bytes: more than any GPU's level-2 cache


class Stopwatch:
    """Seconds of one call: by events on a GPU, whose level-2 cache is overwritten before; by the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def seconds(self, call: Callable[[], object]) -> float:
        """Time one call."""
        if self._flushed is None:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def take_turns(
    calls: Mapping[str, Callable[[], object]], stopwatch: Stopwatch, budget: float, least: int, most: int
) -> dict[str, list[float]]:
    """Time every call, A B C A B C, so that a drift of the machine meets all alike; return seconds by name.

    Each call, made before, takes up to `budget` seconds in all, between `least` and `most` repeats: slow ones sit out
    rounds, evenly spread. The first round only warms up, but counts for calls that use up the budget in it.
    """
    first = {name: stopwatch.seconds(call) for name, call in calls.items()}
    found = {name: [seconds] if seconds >= budget else [] for name, seconds in first.items()}
    warm = {name: seconds if found[name] else stopwatch.seconds(calls[name]) for name, seconds in first.items()}
    repeats = {
        name: min(most, max(least, int(budget / max(seconds, 1e-9)))) - len(found[name])
        for name, seconds in warm.items()
    }
    rounds = max(repeats.values(), default=0)
    for index in range(rounds):
        for name, call in calls.items():
            if (index + 1) * repeats[name] // rounds > index * repeats[name] // rounds:
                found[name].append(stopwatch.seconds(call))
    return found


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, the 10th and 90th percentile, the mean, and how often it was measured."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 9
    return {
        "median": statistics.median(seconds),
        "p10": tenths[0],
        "p90": tenths[-1],
        "mean": statistics.fmean(seconds),
        "repeats": len(seconds),
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of (x, y); nan where there are not two x."""
    if len({x for x, _ in points}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def free_bytes(device: torch.device) -> int:
    """Count the bytes of memory that may still be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 8 * 2**30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))

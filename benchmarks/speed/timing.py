"""Timing of calls that take turns, and what is made of the seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

FLUSH = 2**28  # bytes: more than any GPU's level-2 cache
Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


class Stopwatch:
    """Seconds of one call: by events on a GPU, whose level-2 cache is overwritten before; by the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def seconds(self, call: Call) -> float:
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


@dataclass(frozen=True)
class Turns:
    """How long calls are timed: up to `budget` seconds each in all, between `least` and `most` repeats."""

    budget: float = 0.4
    least: int = 3
    most: int = 64


def take_turns(calls: Mapping[Key, Call], stopwatch: Stopwatch, turns: Turns) -> dict[Key, list[float]]:
    """Time every call, A B C A B C, so that a drift of the machine meets all alike; return seconds by name.

    Slow ones sit out rounds, evenly spread. The first round only warms up, but counts for calls that use up the budget
    in it.
    """
    budget = turns.budget
    first = {name: stopwatch.seconds(call) for name, call in calls.items()}
    found = {name: [seconds] if seconds >= budget else [] for name, seconds in first.items()}
    warm = {name: seconds if found[name] else stopwatch.seconds(calls[name]) for name, seconds in first.items()}
    repeats = {
        name: min(turns.most, max(turns.least, int(budget / max(seconds, 1e-9)))) - len(found[name])
        for name, seconds in warm.items()
    }
    rounds = max(repeats.values(), default=0)
    for index in range(rounds):
        for name, call in calls.items():
            if (index + 1) * repeats[name] // rounds > index * repeats[name] // rounds:
                found[name].append(stopwatch.seconds(call))
    return found


def time_calls(calls: Mapping[str, Call], stopwatch: Stopwatch, turns: Turns) -> dict[str, dict[str, Any]]:
    """Time calls launched kernel by kernel ("call") and, on a GPU, replayed as a CUDA graph ("graph")."""
    found: dict[str, dict[str, Any]] = {name: {} for name in calls}
    ready = {(name, "call"): call for name, call in calls.items()}
    if stopwatch.device.type == "cuda":
        for name, call in calls.items():
            try:
                ready[name, "graph"] = captured(call)
            except Exception as error:
                found[name]["graph_error"] = f"{type(error).__name__}: {error}"
    for (name, how), seconds in take_turns(ready, stopwatch, turns).items():
        found[name][how] = summary(seconds)
    return found


def captured(call: Call) -> Call:
    """Capture a call's kernels as a CUDA graph, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(device: torch.device, size: int = 2**30) -> dict[str, Any]:
    """Measure the bytes per second of a copy, those read and those written."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    stopwatch = Stopwatch(device)
    seconds = [stopwatch.seconds(lambda: target.copy_(source)) for _ in range(21)]
    return {"bytes_per_second": summary([2 * size / each for each in seconds[1:]])}


def summary(figures: Sequence[float]) -> dict[str, Any]:
    """Return the median, the 10th and 90th percentile, the mean, and how often it was measured."""
    tenths = statistics.quantiles(figures, n=10, method="inclusive") if len(figures) > 1 else [figures[0]] * 9
    return {
        "median": statistics.median(figures),
        "p10": tenths[0],
        "p90": tenths[-1],
        "mean": statistics.fmean(figures),
        "repeats": len(figures),
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

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.speed import timing


def test_slope_and_summary_of_made_up_seconds():
    assert timing.slope([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]) == pytest.approx(2.0)
    assert math.isnan(timing.slope([(1.0, 5.0)]))
    found = timing.summary([float(value) for value in range(11)])
    assert (found["p10"], found["median"], found["p90"], found["repeats"]) == (1.0, 5.0, 9.0, 11)


def test_calls_take_turns_and_slow_ones_sit_out():
    seen, seconds = [], {"fast": 0.001, "slow": 0.05, "slowest": 1.0}

    class Stopwatch:
        def seconds(self, call):
            return seconds[call()]

    calls = {name: lambda name=name: seen.append(name) or name for name in seconds}
    found = timing.take_turns(calls, Stopwatch(), timing.Turns(budget=0.1, least=1, most=8))
    assert {name: len(own) for name, own in found.items()} == {"fast": 8, "slow": 2, "slowest": 1}
    assert seen[5:] == [*["fast"] * 4, "slow", *["fast"] * 4, "slow"]


def test_a_copy_reads_and_writes():
    found = timing.copy_bandwidth(torch.device("cpu"), size=2**12)["bytes_per_second"]
    assert found["repeats"] == 20
    assert found["median"] > 2**12


def test_calls_are_timed_by_name():
    calls = {"first": lambda: None, "second": lambda: None}
    found = timing.time_calls(calls, timing.Stopwatch(torch.device("cpu")), timing.Turns(0.1, least=2, most=2))
    assert {name: own["call"]["repeats"] for name, own in found.items()} == {"first": 2, "second": 2}

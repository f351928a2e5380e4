from __future__ import annotations

import random
import statistics

import pytest

from cskv.evaluation.agreement import bootstrap_interval


def test_equal_values_have_no_width_and_one_value_no_interval():
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([2.0]) is None
    assert bootstrap_interval([]) is None


def test_the_same_values_give_the_same_interval():
    values = [random.Random(1).random() for _ in range(20)]
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_many_values_give_the_interval_of_the_normal_approximation():
    values = [random.Random(2).gauss(5.0, 2.0) for _ in range(1)] + [
        random.Random(i).gauss(5.0, 2.0) for i in range(400)
    ]
    low, high = bootstrap_interval(values)
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)

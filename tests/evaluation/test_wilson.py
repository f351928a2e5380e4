from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cskv.evaluation.wilson import wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # 1 of 2: centre 1/2, half-width z * sqrt(1/8 + z^2/16) / (1 + z^2/2) with z = 1.959964
        (1, 2, 0.0945, 0.9055),
        # 0 of 10: low 0, high z^2 / (10 + z^2) = 3.8415 / 13.8415
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_known_intervals(successes, n, low, high):
    assert wilson_interval(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_holds_the_share_and_stays_inside_the_unit_interval(case):
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    mirrored_low, mirrored_high = wilson_interval(n - successes, n)
    assert (1 - mirrored_high, 1 - mirrored_low) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(successes, n)

from __future__ import annotations

import math

import pytest

from cskv.errors import DataError
from cskv.evaluation.agreement import bootstrap_interval
from cskv.evaluation.pooling import Cell, Stretch, Value, pool
from cskv.evaluation.wilson import wilson_interval

KEY = {"method": "PCA", "budget": 0.2, "task": "lines", "size": 200, "protocol": "in-prefill"}


def row(seed, **figures):
    cache = {"ratio": 0.2 + 0.02 * seed, "bytes_per_token": 100.0 + seed}
    return {**KEY, "seed": seed, "cache": cache} | figures


def test_scores_of_two_seeds_are_weighted_by_cases_and_share_one_interval():
    (found,) = pool([row(1, n=30, score=0.5, low=0.3, high=0.7), row(0, n=10, score=0.9, low=0.6, high=1.0)])
    # 15 of 30 and 9 of 10 are 24 of 40. Wilson, z = 1.96: centre (0.6 + 0.04802) / 1.09604 = 0.59124, half 0.14542
    assert found.score.mean == pytest.approx(0.6)
    assert (found.score.low, found.score.high) == pytest.approx((0.4458, 0.7367), abs=2e-4)
    assert (found.n, found.seeds) == (40, (0, 1))
    assert (found.ratio, found.bytes_per_token) == pytest.approx((0.21, 100.5))


def test_one_row_keeps_its_own_interval_or_has_none():
    (own,) = pool([row(0, n=10, score=0.9, low=0.6, high=1.0)])
    (without,) = pool([row(0, n=10, score=0.9)])
    assert own.score == Value(0.9, 0.6, 1.0)
    assert without.score == Value(0.9)


def test_partial_scores_have_an_interval_too():
    (found,) = pool([row(0, n=3, score=0.5), row(1, n=3, score=1 / 3)])
    assert (found.score.low, found.score.high) == wilson_interval(2.5, 6)


def test_rows_that_differ_in_more_than_the_seed_stay_apart():
    changes = [{"budget": None}, {"budget": 0.1}, {"size": 1}, {"protocol": None}, {"method": "SVD"}, {"task": "x"}]
    rows = [row(0, n=1, score=1.0) | change for change in changes]
    assert len(pool(rows)) == 6


def test_needle_cells_are_pooled_by_depth():
    first = [{"depth": 1.0, "n": 2, "score": 0.5}, {"depth": 0.0, "n": 2, "score": 1.0}]
    (found,) = pool(
        [row(0, n=4, score=0.75, cells=first), row(1, n=4, score=0.0, cells=[{"depth": 0.0, "n": 6, "score": 0.0}])]
    )
    assert found.cells == (Cell(0.0, 8, 0.25), Cell(1.0, 2, 0.5))


def test_perplexities_are_pooled_in_nats():
    rows = [row(seed, task="perplexity", tokens=10, perplexity=value) for seed, value in ((0, 4.0), (1, 9.0))]
    (found,) = pool(rows)
    assert found.perplexity.mean == pytest.approx(6.0)  # the geometric mean
    assert (found.perplexity.low, found.perplexity.high) == pytest.approx((4.0, 9.0))
    (one,) = pool(rows[:1])
    assert one.perplexity == Value(pytest.approx(4.0))
    (told,) = pool([rows[0] | {"nll": math.log(5.0)}])
    assert told.perplexity.mean == pytest.approx(5.0)


def test_agreement_is_pooled_over_tokens_and_by_stretch():
    part = {"start": 0, "stop": 8, "top1": 1.0, "kl": 0.2}
    (found,) = pool(
        [
            row(0, task="agreement", tokens=30, top1=0.9, kl=0.1, positions=[part]),
            row(1, task="agreement", tokens=10, top1=0.5, kl=0.5, positions=[part | {"top1": 0.5, "kl": 0.4}]),
        ]
    )
    assert (found.top1.mean, found.top1.low, found.top1.high) == pytest.approx((0.8, 0.5, 0.9))
    assert found.kl.mean == pytest.approx(0.2)
    assert found.positions == (Stretch(0, 8, 0.75, pytest.approx(0.3)),)


DEPARTURE = {"task": "departure", "tokens": 10, "top1": 1.0, "kl": 0.0, "generated": 8}


def test_departures_are_pooled_over_the_texts_of_all_seeds():
    (found,) = pool([row(0, **DEPARTURE, equal_tokens=[8, 2]), row(1, **DEPARTURE, equal_tokens=[3, 1, 8])])
    assert found.generated == 8
    assert found.equal_tokens == Value(pytest.approx(22 / 5), *bootstrap_interval((8, 2, 3, 1, 8)))
    assert found.median_equal == 3
    assert found.still_equal == Value(pytest.approx(2 / 5), *wilson_interval(2, 5))
    assert found.kl.mean == 0
    assert found.score is None


def test_departures_of_different_lengths_are_not_pooled():
    with pytest.raises(DataError, match="rows of PCA on departure generated 8 and 9 tokens"):
        pool([row(0, **DEPARTURE, equal_tokens=[8]), row(1, **DEPARTURE | {"generated": 9}, equal_tokens=[9])])


def test_intervals_of_seeds_add_in_squares():
    kind = {"task": "agreement", "top1": 1.0, "top1_interval": [0.9, 1.0]}
    one = row(0, tokens=30, kl=0.1, kl_interval=[0.06, 0.18], **kind)
    other = row(1, tokens=10, kl=0.5, kl_interval=[0.34, 0.62], **kind)
    (alone,) = pool([one])
    assert (alone.kl.low, alone.kl.high) == pytest.approx((0.06, 0.18))
    (both,) = pool([one, other])
    # 3/4 and 1/4 of the tokens: down hypot(0.03, 0.04) = 0.05, up hypot(0.06, 0.03)
    assert (both.kl.mean, both.kl.low, both.kl.high) == pytest.approx((0.2, 0.15, 0.2 + math.sqrt(0.0045)))
    assert both.top1.high == 1.0
    (without,) = pool([one, other | {"kl_interval": None}])  # of a single text
    assert (without.kl.low, without.kl.high) == (0.1, 0.5)


def test_the_range_of_a_perplexity_is_that_of_its_distance_from_the_uncompressed_one():
    """Seed 1 has harder texts, for every method."""
    kind = {"task": "perplexity", "tokens": 10}
    easy = row(0, perplexity=5.0, reference_perplexity=4.0, **kind)
    hard = row(1, perplexity=20.0, reference_perplexity=20.0, **kind)
    (found,) = pool([easy, hard])
    assert found.perplexity.mean == pytest.approx(10.0)
    root = math.sqrt(1.25)
    assert (found.perplexity.low, found.perplexity.high) == pytest.approx((10 / root, 10 * root))
    (alone,) = pool([easy | {"nll_increase_interval": [math.log(1.2), math.log(1.3)]}])
    assert (alone.perplexity.low, alone.perplexity.high) == pytest.approx((4.8, 5.2))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"score": None}, "score of PCA on lines is None"),
        ({"score": 1.5}, "is 1.5; expected a number from 0 to 1"),
        ({"score": True}, "score of PCA on lines is True"),
        ({"n": 0}, "n of PCA on lines is 0"),
        ({"n": "many"}, "n of PCA on lines is 'many'"),
        ({"low": float("nan"), "high": 1.0}, "low of PCA on lines is nan"),
        ({"cells": [3]}, "cells of PCA on lines are no list of objects"),
        ({"cells": [{"depth": 0.0, "n": 1}]}, "score of PCA on lines is None"),
        ({"method": ["PCA"]}, r"a row has method \['PCA'\]"),
        ({"protocol": []}, r"a row has .* protocol \[\]"),
        ({"size": "200"}, "size '200'"),
        ({"cache": 3}, "a cache that is an object"),
        ({"cache": {"ratio": "half"}}, "ratio of PCA on lines is 'half'"),
        ({"task": "perplexity", "tokens": 1}, "perplexity of PCA on perplexity is None"),
        ({"task": "agreement", "tokens": 1, "top1": 1.0, "kl": 1.0, "kl_interval": [2.0, 1.0]}, "kl_interval of PCA"),
        ({"task": "agreement", "tokens": 1, "top1": 1.0, "kl": 1.0, "kl_interval": 3}, "is 3; expected two numbers"),
        ({"task": "agreement", "tokens": 1, "top1": 1.0, "kl": -1.0}, "kl of PCA on agreement is -1.0"),
        (DEPARTURE, "equal_tokens of PCA on departure are None"),
        (DEPARTURE | {"equal_tokens": [9]}, r"equal_tokens of PCA on departure are \[9\]; expected a list of numbers"),
    ],
)
def test_a_damaged_row_is_named_in_one_line(changes, complaint):
    with pytest.raises(DataError, match=complaint) as caught:
        pool([row(0, n=10, score=0.5) | changes])
    assert "\n" not in str(caught.value)

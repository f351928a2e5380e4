from __future__ import annotations

import pytest

from cskv.evaluation.pooling import pool
from cskv.plots.series import HUES, dots, method_looks, method_names, pareto_front, shown
from tests.plots.made_up import METHODS, rows_of


def points(*methods):
    return pool(row for method in methods for budget in (0.5, 0.1) for row in rows_of(method, budget, 0))


def test_the_front_keeps_what_nothing_smaller_beats():
    found = [(30.0, 80.0), (10.0, 20.0), (20.0, 10.0), (10.0, 5.0), (50.0, 80.0), (100.0, 100.0)]
    assert pareto_front(found, "more") == [(10.0, 20.0), (30.0, 80.0), (100.0, 100.0), (100.0, 100.0)]
    assert pareto_front(found, "less") == [(10.0, 5.0), (100.0, 5.0)]


def test_fifteen_methods_are_told_apart():
    names = [f"method {i}" for i in range(15)]
    looks = method_looks(points(*names))
    kinds = {(look["color"], look["marker"], look["markerfacecolor"], look["linestyle"]) for look in looks.values()}
    assert len(kinds) == 15
    assert {look["color"] for look in looks.values()} == set(HUES)


def test_a_method_looks_the_same_wherever_the_uncompressed_one_comes():
    reference = pool(rows_of("uncompressed", None, 0))
    some = points("PCA", "SVD")
    assert method_looks([*some, *reference]) == method_looks([*reference, *some])
    assert method_looks(reference + some)["uncompressed"]["marker"] == "*"
    assert method_names(some + reference) == ["uncompressed", "PCA", "SVD"]


def test_results_without_bytes_or_without_the_figure_are_no_dots():
    rows = list(rows_of("PCA", 0.1, 0))
    rows[0].pop("cache")
    rows[1]["cache"] = None
    found = dots(pool(rows), lambda point: point.score, 100.0)
    scored = [point for point in pool(rows) if point.score is not None]
    assert len(found) == len(scored) - 2
    assert found[0].y.mean == pytest.approx(100 * scored[2].score.mean)


@pytest.mark.parametrize("name", ["_hidden", "a$b$", "x" * 200, "word " * 60, *METHODS])
def test_any_name_can_stand_in_a_legend(name):
    text = shown(name)
    assert not text.startswith("_")
    assert len(text) <= 45
    assert text.strip(" …")

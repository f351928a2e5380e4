from __future__ import annotations

import pytest

from cskv.evaluation.pooling import pool
from cskv.plots.series import HUES, method_looks, method_names, shown
from tests.plots.made_up import METHODS, rows_of


def points(*methods):
    return pool(row for method in methods for budget in (0.5, 0.1) for row in rows_of(method, budget, 0))


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


@pytest.mark.parametrize("name", ["_hidden", "a$b$", "x" * 200, "word " * 60, *METHODS])
def test_any_name_can_stand_in_a_legend(name):
    text = shown(name)
    assert not text.startswith("_")
    assert len(text) <= 45
    assert text.strip(" …")

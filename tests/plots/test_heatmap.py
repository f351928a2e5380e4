from __future__ import annotations

import pytest

from cskv.errors import DataError
from cskv.evaluation.pooling import pool
from cskv.plots import plot_needles
from cskv.plots.heatmap import _maps, _slots
from tests.plots.made_up import rows_of
from tests.plots.support import PNG

pytest.importorskip("matplotlib")


def needles(*wanted, task="needle", protocol="in-prefill"):
    found = pool(row for method, budget in wanted for row in rows_of(method, budget, 0))
    return [point for point in found if (point.task, point.protocol) == (task, protocol)]


def test_a_map_per_method_and_budget_uncompressed_last():
    found = needles(("uncompressed", None), ("SVD", 0.1), ("PCA", 0.2), ("SVD", 0.5))
    assert list(_maps(found)) == [("SVD", 0.5), ("SVD", 0.1), ("PCA", 0.2), ("uncompressed", None)]
    assert [point.size for point in _maps(found)["PCA", 0.2]] == [1024, 2048, 4096]


def test_a_row_of_maps_is_a_method_where_budgets_allow_it():
    methods = [(name, budget) for name in "abc" for budget in (0.5, 0.3, 0.2, 0.1)]
    assert _slots([*methods, ("uncompressed", None)]) == (list(range(13)), 4)
    fewer = [entry for entry in methods if entry not in (("b", 0.2), ("b", 0.1))]
    assert _slots(fewer) == ([0, 1, 2, 3, 4, 5, 8, 9, 10, 11], 4)
    assert _slots(methods[:3]) == ([0, 1, 2], 3)
    assert _slots([(name, 0.2) for name in "abcdefghi"]) == (list(range(9)), 3)


@pytest.mark.parametrize(
    "wanted",
    [
        [("PCA", 0.2)],
        [("uncompressed", None)],
        [("a long name of a method that goes on for more than two lines of a small map, surely", 0.125)] * 1
        + [("_$x", budget) for budget in (0.5, 0.4, 0.3, 0.2, 0.1)],
    ],
)
def test_maps_are_drawn(tmp_path, wanted):
    found = needles(*wanted)[:-1]  # one length is missing in the last map
    assert plot_needles(found, tmp_path / "n.png").read_bytes().startswith(PNG)


def test_what_cannot_share_a_figure_is_refused(tmp_path):
    both = needles(("PCA", 0.2)) + needles(("PCA", 0.2), protocol="context-first")
    with pytest.raises(DataError, match="one task under one protocol"):
        plot_needles(both, tmp_path / "n.png")
    with pytest.raises(DataError, match="has cells"):
        plot_needles(needles(("PCA", 0.2), task="perplexity", protocol=None), tmp_path / "n.png")
    assert not list(tmp_path.iterdir())

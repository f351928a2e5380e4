from __future__ import annotations

import pytest

from cskv.errors import DataError
from cskv.evaluation.pooling import pool
from cskv.plots import (
    method_looks,
    pareto,
    plot_accuracy,
    plot_agreement,
    plot_divergence,
    plot_perplexity,
    plot_positions,
    plot_spectra,
)
from cskv.plots.pareto import _find_dots, pareto_front
from cskv.plots.style import side_by_side
from tests.plots.made_up import METHODS, rows_of
from tests.plots.support import PNG

pytest.importorskip("matplotlib")


def points(methods, budgets=(0.5, 0.2, 0.05), seeds=(0, 1), reference=True):
    rows = [row for seed in seeds for name in methods for budget in budgets for row in rows_of(name, budget, seed)]
    return pool(rows + [row for seed in seeds if reference for row in rows_of("uncompressed", None, seed)])


def of(found, task, size):
    return [point for point in found if (point.task, point.size) == (task, size)]


@pytest.mark.parametrize(
    "found",
    [
        points([*METHODS, "one more", "another"]),
        points(["PCA"], [0.2], [0], reference=False),
        points([], seeds=[0]),
        points(["_hidden", "a$b$", "<script>"], seeds=[0]),
    ],
    ids=["fifteen methods", "one point", "only uncompressed", "odd names"],
)
def test_everything_is_drawn_over_bytes(tmp_path, found):
    looks = method_looks(found)
    drawn = [
        plot_accuracy(of(found, "lines", 200), tmp_path / "a.png", "$x", looks),
        plot_perplexity(of(found, "perplexity", 2048), tmp_path / "b.png"),
        plot_agreement(of(found, "agreement", 2048), tmp_path / "c.png", looks=looks),
    ]
    if any(point.budget for point in found):
        drawn.append(plot_divergence(of(found, "agreement", 2048), tmp_path / "d.png", looks=looks))
    assert all(path.read_bytes().startswith(PNG) for path in drawn)


def test_scores_without_intervals_are_drawn(tmp_path):
    rows = list(rows_of("PCA", 0.2, 0))
    for row in rows:
        row.pop("low", None)
    found = pool(rows)
    assert all(point.score.low is None for point in found if point.score is not None)
    assert plot_accuracy(of(found, "lines", 100), tmp_path / "a.png").exists()


def test_agreement_along_the_text_is_drawn_for_one_budget_of_each_method(tmp_path):
    found = of(points(["PCA", "SVD"]), "agreement", 2048)
    chosen = [point for point in found if point.budget == 0.2]
    assert plot_positions(chosen, tmp_path / "p.png").read_bytes().startswith(PNG)
    with pytest.raises(DataError, match="PCA, SVD come"):
        plot_positions(found, tmp_path / "q.png")
    with pytest.raises(DataError, match="has positions"):
        plot_positions(of(points(["PCA"]), "lines", 200), tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()


def drawn_axes(monkeypatch, plot, found, path):
    """The panels that a plot draws."""
    figures = []
    monkeypatch.setattr(pareto, "save", lambda figure, path: figures.append(figure) or path)
    plot(found, path)
    return figures[0].axes


def kl_rows(**methods):
    """Two budgets of each method, with KL and interval."""
    return [
        {**row, "budget": budget, "cache": {"ratio": budget or 1.0}, "kl": kl, "kl_interval": [kl / 2, 3 * kl]}
        for name, values in methods.items()
        for budget, kl in values.items()
        for row in rows_of(name, budget, 0)
        if row["task"] == "agreement"
    ]


def test_methods_are_lines_in_bands_that_are_their_intervals(tmp_path, monkeypatch):
    found = pool(kl_rows(PCA={0.5: 0.01, 0.1: 0.1}, SVD={0.5: 0.2, 0.1: 0.9}, alone={0.2: 0.05}))
    (ax,) = drawn_axes(monkeypatch, plot_divergence, found, tmp_path / "a.png")
    assert ax.get_yscale() == ax.get_xscale() == "log"
    bands = [c.get_paths()[0].vertices for c in ax.collections if type(c).__name__.endswith("PolyCollection")]
    assert [(band[:, 1].min(), band[:, 1].max()) for band in bands] == [
        (pytest.approx(0.005), pytest.approx(0.3)), (pytest.approx(0.1), pytest.approx(2.7))
    ]  # fmt: skip
    low, high = ax.get_ylim()
    assert low < 0.01
    assert high > 2.7


def test_the_front_of_all_methods_is_a_thin_step_line(tmp_path, monkeypatch):
    found = pool(kl_rows(PCA={0.5: 0.01, 0.1: 0.1}, SVD={0.5: 0.2, 0.05: 0.9}))
    (ax,) = drawn_axes(monkeypatch, plot_divergence, found, tmp_path / "a.png")
    (front,) = [line for line in ax.get_lines() if line.get_drawstyle() == "steps-post"]
    assert list(front.get_xdata()) == pytest.approx([5, 10, 50, 50])
    assert list(front.get_ydata()) == pytest.approx([0.9, 0.1, 0.01, 0.01])
    assert front.get_linewidth() < 1.4


@pytest.mark.parametrize(("rounding", "levels"), [(0.002, 1), (1e-9, 0), (0.0, 0)])
def test_what_rounding_does_is_a_level_unless_it_is_far_below(tmp_path, monkeypatch, rounding, levels):
    found = pool(kl_rows(uncompressed={None: rounding}, PCA={0.5: 0.01, 0.1: 0.1}))
    (ax,) = drawn_axes(monkeypatch, plot_divergence, found, tmp_path / "a.png")
    assert sum(len(set(line.get_ydata())) == 1 and len(line.get_ydata()) == 2 for line in ax.get_lines()) == levels
    assert ax.get_ylim()[0] > 1e-3


def test_a_divergence_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="a KL divergence above 0"):
        plot_divergence(pool(kl_rows(PCA={0.5: 0.0})), tmp_path / "a.png")


def test_several_tasks_in_one_figure_are_refused(tmp_path):
    found = points(["PCA"], seeds=[0])
    with pytest.raises(DataError, match="one task of one size"):
        plot_accuracy(found, tmp_path / "a.png")
    with pytest.raises(DataError, match="a perplexity and its cache's bytes"):
        plot_perplexity(of(found, "lines", 200), tmp_path / "b.png")
    assert not list(tmp_path.iterdir())


def test_results_without_bytes_or_without_the_figure_are_no_dots():
    rows = [row for row in rows_of("PCA", 0.1, 0) if (row["task"], row["size"]) == ("lines", 100)]
    rows += [row | {"seed": 1, "method": name} for row in rows[:1] for name in ("no bytes", "null")]
    del rows[-2]["cache"]
    rows[-1]["cache"] = None
    rows += [row for row in rows_of("PCA", 0.1, 0) if row["task"] == "perplexity"]
    found = _find_dots(pool(rows), lambda point: point.score, "a score", 100.0)
    assert {dot.of.method for dot in found} == {"PCA"}
    assert found[0].y.mean == pytest.approx(100 * rows[0]["score"])


def test_the_front_keeps_what_nothing_smaller_beats():
    found = [(30.0, 80.0), (10.0, 20.0), (20.0, 10.0), (10.0, 5.0), (50.0, 80.0), (100.0, 100.0)]
    assert pareto_front(found, "more") == [(10.0, 20.0), (30.0, 80.0), (100.0, 100.0), (100.0, 100.0)]
    assert pareto_front(found, "less") == [(10.0, 5.0), (100.0, 5.0)]


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least one"):
        plot_spectra([], tmp_path / "empty.png")


def test_points_at_one_place_are_set_side_by_side_around_it():
    assert side_by_side([100.0, 20.0, 20.0, 20.0], 2.0) == pytest.approx([100.0, 18.0, 20.0, 22.0])

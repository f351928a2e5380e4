"""The committed results: the pages that are made of them, and how a rerun is held against them."""

from __future__ import annotations

import pytest
import results_check
import results_report
from results_report import Points, main_table, verdict

from cskv.evaluation.pooling import Value, pool

pytest.importorskip("matplotlib")


def row(method: str, score: float, **changes: object) -> dict:
    return {
        "method": method,
        "budget": 0.2,
        "task": "lines",
        "size": 200,
        "protocol": "in-prefill",
        "seed": 0,
        "n": 50,
        "score": score,
        "low": score - 0.1,
        "high": score + 0.1,
        "cache": {"ratio": 0.25, "bytes_per_token": 1024.0},
        **changes,
    }


def test_the_pages_are_those_of_the_committed_results():
    runs = results_report.read_all(results_report.COMMITTED)
    for page, text in results_report.texts(runs).items():
        assert f"\n\n{text}\n\n<!-- end of results_report -->" in page.read_text(encoding="utf-8"), page.name


def test_a_rerun_agrees_where_its_figures_lie_in_the_committed_intervals():
    committed = [row("A", 0.5), row("B", 0.5), row("C", 0.5), row("D", 0.5)]
    rerun = [row("A", 0.55), row("B", 0.65), row("C", 0.35), row("E", 0.5)]
    text = {"method": "A", "budget": 0.2, "task": "perplexity", "size": 512, "protocol": None, "seed": 0}
    committed.append(text | {"perplexity": 20.0, "perplexity_interval": [19.0, 21.0]})
    rerun.append(text | {"perplexity": 21.5})
    compared, missing, outside = results_check.departures(rerun, committed)
    assert (compared, missing) == (4, 2)
    assert sorted(entry["method"] for entry, _ in outside) == ["A", "B", "C"]
    assert any(text == "perplexity 21.5, expected 19 to 21" for _, text in outside)


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (Value(0.9, 0.8, 0.95), Value(0.5, 0.4, 0.6), "yes"),
        (Value(0.5, 0.4, 0.6), Value(0.9, 0.8, 0.95), "NO, the other way round"),
        (Value(0.5, 0.4, 0.6), Value(0.45, 0.35, 0.55), "not told apart"),
        (None, Value(0.5, 0.4, 0.6), "not measured"),
    ],
)
def test_an_order_is_told_by_intervals(better, worse, expected):
    assert verdict(better, worse) == expected


def test_a_row_of_the_table_pools_seeds():
    points = Points(pool([row("A", 0.9), row("A", 1.0, seed=1)]))
    last = main_table(points, [("A", 0.2), ("missing", 0.2)]).splitlines()
    assert last[2].startswith("| A | 80 % | 1,024 | 25.0 % | 95 % (89-98) | – |")
    assert last[3] == "| missing | 80 % | – | – | – | – | – | – | – |"

"""Tables of results, and how a rerun is held against them."""

from __future__ import annotations

import pytest

from benchmarks.quality.check import check_folder, departures
from benchmarks.quality.report import verdict
from benchmarks.quality.tables import Points
from cskv.errors import DataError
from cskv.evaluation.pooling import Value, pool


def row(method: str, score: float, **changes: object) -> dict:
    return {
        "method": method,
        "budget": 0.2,
        "task": "niah-single",
        "size": 1024,
        "protocol": "context-first",
        "seed": 0,
        "n": 50,
        "score": score,
        "low": score - 0.1,
        "high": score + 0.1,
        "cache": {"ratio": 0.25, "bytes_per_token": 1024.0},
        **changes,
    }


def test_a_rerun_agrees_where_its_figures_lie_in_the_committed_intervals():
    committed = [row("A", 0.5), row("B", 0.5), row("C", 0.5), row("D", 0.5)]
    rerun = [row("A", 0.55), row("B", 0.65), row("C", 0.35), row("E", 0.5)]
    text = {"method": "A", "budget": 0.2, "task": "agreement", "size": 512, "protocol": None, "seed": 0}
    committed.append(text | {"kl": 0.02, "kl_interval": [0.01, 0.03], "top1": 0.9, "top1_interval": [0.88, 0.92]})
    rerun.append(text | {"kl": 0.04, "top1": 0.91})
    compared, missing, outside = departures(rerun, committed)
    assert (compared, missing) == (5, 2)
    assert sorted(entry["method"] for entry, _ in outside) == ["A", "B", "C"]
    assert any(text == "kl 0.04, expected 0.01 to 0.03" for _, text in outside)


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (Value(0.9, 0.8, 0.95), Value(0.5, 0.4, 0.6), "yes: 90 % (80-95), 50 % (40-60)"),
        (Value(0.5, 0.4, 0.6), Value(0.9, 0.8, 0.95), "NO, the other way round: 50 % (40-60), 90 % (80-95)"),
        (Value(0.5, 0.4, 0.6), Value(0.45, 0.35, 0.55), "not told apart: 50 % (40-60), 45 % (35-55)"),
        (None, Value(0.5, 0.4, 0.6), "not measured"),
    ],
)
def test_an_order_is_told_by_intervals(better, worse, expected):
    assert verdict(better, worse) == expected


def test_a_row_pools_seeds_and_a_column_that_nobody_has_is_left_out():
    text = {"task": "agreement", "size": 512, "protocol": None, "tokens": 100, "top1": 0.95, "positions": []}
    rows = [
        row("A", 0.9),
        row("A", 1.0, seed=1),
        row("B", 0.0, **text, kl=0.02),
        row("B", 0.0, **text, kl=0.04, seed=1),
    ]
    table = Points(pool(rows)).table(("bytes", "KL", "perplexity", "needles, context first", "lines"))
    assert table.headings == ("cache", "bytes", "KL", "needles, context first")
    assert table.rows == [["A, 20 %", "–", "–", "95 % (89-98)"], ["B, 20 %", "25.0%", "0.0300 (0.0200-0.0400)", "–"]]


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(DataError, match="has no figure that .* has as well"):
        check_folder(tmp_path, tmp_path)

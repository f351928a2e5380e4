from __future__ import annotations

import csv

import pytest

from cskv.evaluation.pooling import pool
from cskv.report.summary import Entry, summarise, write_csv
from cskv.report.text import budget_text, count_text, date_text, kl_text, percent_text, perplexity_text, sizes_text


def row(method, budget, score, seed=0, task="lines", size=200, n=10, protocol="in-prefill", **figures):
    return {
        "method": method, "budget": budget, "task": task, "size": size, "protocol": protocol, "seed": seed, "n": n,
        "score": score, "cache": {"ratio": budget or 1.0, "bytes_per_token": 1000 * (budget or 1.0)},
    } | figures  # fmt: skip


def lines(rows):
    return {(line.method, line.budget): line for group in summarise(pool(rows)).groups for line in group}


def test_two_seeds_and_two_sizes_make_one_figure_with_one_interval():
    rows = [row("PCA", 0.2, 0.8, seed) for seed in (0, 1)] + [row("PCA", 0.2, 0.2, seed, size=400) for seed in (0, 1)]
    table = summarise(pool(rows))
    assert table.columns == [("lines, %", "200 and 400 lines, in-prefill")]
    # 20 of 40: Wilson gives 0.3520 to 0.6480
    assert table.groups[0][0].entries == [Entry("50.0", "35–65")]


def test_budgets_are_groups_uncompressed_first_and_methods_keep_their_order():
    rows = [row(name, budget, 0.5) for name in ("SVD", "PCA") for budget in (0.1, 0.5)] + [row("full", None, 1.0)]
    groups = summarise(pool(rows)).groups
    assert [[(line.method, line.budget) for line in group] for group in groups] == [
        [("full", None)], [("SVD", 0.5), ("PCA", 0.5)], [("SVD", 0.1), ("PCA", 0.1)]
    ]  # fmt: skip


def test_the_best_of_a_budget_is_marked_and_not_where_all_are_alike():
    found = lines(
        [row("PCA", 0.2, 0.9), row("SVD", 0.2, 0.5), row("ASVD", 0.2, 0.9), row("PCA", 0.1, 0.5), row("SVD", 0.1, 0.5)]
    )
    assert {key: line.entries[0].best for key, line in found.items()} == {
        ("PCA", 0.2): True, ("SVD", 0.2): False, ("ASVD", 0.2): True, ("PCA", 0.1): False, ("SVD", 0.1): False
    }  # fmt: skip


def test_less_is_better_where_it_is():
    kind = {"task": "perplexity", "protocol": None, "tokens": 10}
    agreement = {"task": "agreement", "protocol": None, "tokens": 10}
    rows = [row(name, 0.2, None, perplexity=value, **kind) for name, value in (("PCA", 9.0), ("SVD", 20.0))]
    rows += [
        row("PCA", 0.2, None, top1=0.9, kl=0.25, **agreement),
        row("SVD", 0.2, None, top1=0.95, kl=0.5, **agreement),
    ]
    found = lines(rows)
    assert found["PCA", 0.2].entries == [Entry("9.00", "", True), Entry("90.0"), Entry("0.2500", "", True)]
    assert found["SVD", 0.2].entries == [Entry("20.00"), Entry("95.0", "", True), Entry("0.5000")]


def test_departures_have_two_columns_and_more_is_better():
    kind = {"task": "departure", "protocol": None, "tokens": 10, "top1": 1.0, "generated": 512, "size": 1024}
    rows = [row("PCA", 0.2, None, equal_tokens=[512, 90], kl=0.1, **kind)]
    rows += [row("SVD", 0.2, None, equal_tokens=[12, 17], kl=0.3, **kind)]
    table = summarise(pool(rows))
    assert table.columns[:2] == [
        ("equal tokens", "of 512, after 1,024"),
        ("equal to the end, %", "of 512, after 1,024"),
    ]
    assert table.columns[-1] == ("KL, nats", "per token, generated after 1,024 tokens")
    ((first, second),) = table.groups
    assert first.entries[:2] == [Entry("301", "90–512", True), Entry("50.0", "9–91", True)]
    assert second.entries[:2] == [Entry("14", "12–17"), Entry("0.0", "0–66")]
    told = next(csv.DictReader(write_csv(pool(rows)).splitlines(keepends=True)))
    assert [told[name] for name in ("generated", "equal_tokens", "median_equal", "still_equal", "best")] == [
        "512", "301", "301", "0.5", "1"
    ]  # fmt: skip


def test_seeds_that_agree_need_no_small_print():
    kind = {"task": "perplexity", "protocol": None, "tokens": 10}
    rows = [row("PCA", 0.2, None, seed, perplexity=value, **kind) for seed, value in ((0, 9.0), (1, 9.001))]
    assert lines(rows)["PCA", 0.2].entries == [Entry("9.00")]


def test_a_method_that_lacks_a_size_says_so_and_is_not_compared():
    found = lines(
        [row("PCA", 0.2, 0.5), row("PCA", 0.2, 0.5, size=400), row("SVD", 0.2, 1.0), row("H2O", 0.2, 1.0, task="x")]
    )
    assert found["SVD", 0.2].entries[0] == Entry("100", "(1 of 2 sizes)")
    assert found["H2O", 0.2].entries[0] == Entry()
    assert not found["PCA", 0.2].entries[0].best


def test_the_csv_has_every_size_and_marks_the_best():
    points = pool(
        [row("PCA", 0.2, 0.9, 0), row("PCA", 0.2, 0.7, 1), row('SVD, "x"\n', 0.2, 0.5), row("full", None, 1.0)]
    )
    rows = list(csv.DictReader(write_csv(points).splitlines(keepends=True)))
    assert [entry["method"] for entry in rows] == ["PCA", 'SVD, "x"\n', "full"]
    assert float(rows[0]["score"]) == pytest.approx(0.8)
    assert [rows[0][name] for name in ("seeds", "n", "size", "ratio", "perplexity", "best")] == [
        "0 1",
        "20",
        "200",
        "0.2",
        "",
        "1",
    ]
    assert [entry["best"] for entry in rows] == ["1", "0", "0"]
    assert rows[2]["budget"] == ""


def test_the_csv_has_the_interval_of_a_divergence():
    kind = {"task": "agreement", "protocol": None, "tokens": 10, "top1": 0.5, "kl": 0.25, "kl_interval": [0.125, 0.5]}
    (entry,) = csv.DictReader(write_csv(pool([row("PCA", 0.2, None, **kind)])).splitlines())
    assert [entry[name] for name in ("kl", "kl_least", "kl_most", "top1")] == ["0.25", "0.125", "0.5", "0.5"]


def test_figures_are_written_as_people_write_them():
    assert [percent_text(share) for share in (1.0, 0.9996, 0.5, 0.0)] == ["100", "100.0", "50.0", "0.0"]
    assert [budget_text(budget) for budget in (None, 0.125, 0.2)] == ["uncompressed", "12.5 %", "20 %"]
    assert [perplexity_text(value) for value in (17.4, 1234.5)] == ["17.40", "1,234"]
    assert [kl_text(value) for value in (0.01234, 2.5)] == ["0.0123", "2.500"]
    assert count_text(1228.8) == "1,229"
    assert sizes_text("needle", {4096, 1024, 2048}) == "1,024 to 4,096 tokens"
    assert [date_text(date) for date in ("2026-11-25T10:00:00+00:00", "2026-11-25T10:00:00", "soon", None)] == [
        "2026-11-25 10:00 UTC", "2026-11-25 10:00", "soon", "undated"
    ]  # fmt: skip

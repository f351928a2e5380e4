"""The pages that are made of committed results, and the rows that they are made of."""

from __future__ import annotations

import json

import closed_form
import common
import grids
import pages
import pytest
import quantised

pytest.importorskip("matplotlib")


@pytest.fixture
def written(monkeypatch):
    """What would be written, by page."""
    texts = {}
    monkeypatch.setattr(pages, "write_text", lambda page, text: texts.update({page: text}))
    return texts


def no_drawing(monkeypatch, module, *names):
    for name in names:
        monkeypatch.setattr(module, name, lambda *_args, **_kwargs: None)


def test_closed_form(written, monkeypatch):
    no_drawing(monkeypatch, closed_form, "draw_pair", "plot_losses", "plot_ranks")
    results = common.read_results(common.RESULTS / "closed_form.json")
    closed_form.write_report(results)
    assert written == {page: page.read_text() for page in [pages.DOCS / "closed-form.md"]}


def test_quantisation(written, monkeypatch):
    no_drawing(monkeypatch, quantised, "draw_pair")
    quantised.write_report(common.read_results(common.RESULTS / "quantised.json"))
    assert written == {page: page.read_text() for page in [pages.DOCS / "quantisation.md"]}
    rows = common.read_results(common.RESULTS / "grids.json")["rows"]
    assert grids.table({name: rows[name] for name in grids.makers()}).markdown() in written.popitem()[1]


def test_a_row_that_lacks_a_method_is_measured_again_and_others_are_kept(tmp_path):
    path, measured = tmp_path / "rows.json", []
    results = {"rows": {"1": {"methods": {"a": 1}}, "2": {"methods": {"a": 1, "b": 1}}, "3": {"skipped": "too large"}}}

    def job(name):
        return lambda: measured.append(name) or {"methods": {"a": 2, "b": 2}}

    common.measure_missing(path, results, {name: job(name) for name in "124"}, ["a", "b"])
    assert measured == ["1", "4"]
    kept = json.loads(path.read_text())
    assert sorted(kept["rows"]) == ["1", "2", "3", "4"]
    assert kept["rows"]["2"]["methods"]["b"] == 1
    assert kept["environment"]["torch"]


def test_a_table_on_a_page_and_on_a_terminal(capsys):
    table = pages.Table("Title", ("a", "b"), [("x", "1")])
    assert table.markdown() == "**Title**\n\n| a | b |\n|---|---|\n| x | 1 |"
    assert pages.Table("", ("a",), []).markdown() == "| a |\n|---|"
    table.print()
    assert "Title" in capsys.readouterr().out

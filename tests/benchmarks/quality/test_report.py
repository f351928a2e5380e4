"""The pages are those of the committed results."""

from __future__ import annotations

import re

import pytest

from benchmarks.quality import report
from benchmarks.quality.report import BLOCKS, PAGES, SCRIPT, blocks_of
from benchmarks.quality.run import RESULTS
from benchmarks.quality.subjects import SUBJECTS
from benchmarks.quality.suites import SUITES
from benchmarks.quality.tables import Results
from cskv.evaluation.results import read_run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_are_those_of_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    for name, parts in blocks_of(page, Results(RESULTS)).items():
        begin, end = f"<!-- measured: benchmarks/{SCRIPT}.py {name} -->", f"<!-- end of {name} -->"
        assert text.split(begin)[1].split(end)[0] == "\n\n".join(["", *parts, ""])


def test_every_block_is_on_a_page_and_every_marker_is_a_block():
    marked = [name for page in PAGES for name in re.findall(rf"{SCRIPT}\.py ([\w-]+) -->", page.read_text())]
    assert sorted(marked) == sorted(BLOCKS)


def test_committed_results_are_of_suites_and_of_one_text():
    runs = {path.stem: read_run(path) for path in RESULTS.glob("*.json")}
    assert set(runs) <= {f"{subject}-{suite}" for subject in SUBJECTS for suite in SUITES}
    assert len({run.settings["calibration"] for run in runs.values()}) <= 1


def test_a_figure_is_drawn_of_every_model_that_was_measured(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    report.draw(Results(RESULTS))
    drawn = {path.name for path in tmp_path.glob("figures/*.png")}
    assert drawn == {f"quality-{path.stem.removesuffix('-caches')}.png" for path in RESULTS.glob("*-caches.json")}
    assert drawn <= {path.name for path in (RESULTS.parent / "figures").glob("*.png")}

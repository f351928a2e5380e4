from __future__ import annotations

import json
import shutil

import pytest

from benchmarks import pages
from benchmarks.common import RESULTS
from benchmarks.speed import report
from benchmarks.speed.registry import Unavailable

pytest.importorskip("matplotlib")
PAGE = "\n".join(
    f"<!-- measured: benchmarks/speed/{name}.py -->\nold\n<!-- end of speed/{name} -->\n"
    for name in ("decode", "generation", "gpu")
)


def test_the_pages_are_those_of_the_committed_results(monkeypatch):
    written = {}
    monkeypatch.setattr(pages, "write_text", lambda page, text: written.update({page: text}))
    monkeypatch.setattr(report, "draw", lambda *_args: None)
    report.write_pages(RESULTS)
    assert written == {page: page.read_text() for page in (pages.DOCS / "decode-speed.md", pages.DOCS / "vllm.md")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_fills_its_place_of_the_page(tmp_path, decoded, device):
    (tmp_path / "decode-speed.md").write_text(PAGE)
    results = decoded | {"settings": decoded["settings"] | {"device": device}}
    (tmp_path / "decode.json").write_text(json.dumps(results))
    whole = {"size": "8B", "batch": 1, "tokens": 65_536, "nbytes": 1, "tokens_per_second": {"median": 50.0}}
    rows = {name: whole | {"method": name} for name in ("uncompressed, in place", "commuting")}
    (tmp_path / "graph.json").write_text(json.dumps({"rows": rows}))
    report.write_pages(tmp_path, tmp_path)
    text = (tmp_path / "decode-speed.md").read_text()
    assert "| commuting, 4 bits |" in text
    assert f"Goals on a {'CPU' if device == 'cpu' else 'GPU'}" in text
    assert text.count("old") == 2
    assert ("| commuting: >= 1.5x tokens/s of the fastest uncompressed | 1.00x | **no** |" in text) == (
        device == "cuda"
    )
    name = "decode-speed.png" if device == "cpu" else "decode-speed-gpu.png"
    assert (tmp_path / "figures" / name).stat().st_size > 10_000


def test_a_folder_without_results_is_refused(tmp_path):
    shutil.copy(RESULTS / "generation.json", tmp_path)
    with pytest.raises(Unavailable, match="measure them first"):
        report.write_pages(tmp_path)

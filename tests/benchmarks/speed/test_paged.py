"""In Triton's interpreter, as `tests/conftest.py` asks for where there is no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed import paged
from benchmarks.speed.run import main
from tests.interpreter import mend_interpreter

pytest.importorskip("triton")
mend_interpreter()


def run(path, *names: str) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = ["--quick", "--device", device, "--lengths", "32", "--block-size", "32"]
    return main(["paged", *small, "--methods", *names, "--out", str(path)])


def test_outputs_are_checked_on_requests_of_equal_and_of_mixed_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(paged, "time_calls", lambda calls, *_: {name: {"call": {"median": 1.0}} for name in calls})
    path, packed = tmp_path / "paged.json", "20 % x int4"
    assert run(path, paged.SDPA, paged.FLASH, packed) == 0
    rows = json.loads(path.read_text())["rows"]
    assert set(rows) == {"2 x 32", "2 x 32, mixed"}
    for row in rows.values():
        assert set(row["methods"]) == {paged.SDPA, paged.FLASH, packed}
        assert all("skipped" in own or own["error"] < 0.02 for own in row["methods"].values())
        assert row["methods"][packed]["nbytes"] < row["methods"][paged.SDPA]["nbytes"]


def test_a_wrong_output_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paged.launch, "attention", lambda query, _inputs: torch.zeros_like(query))
    assert run(tmp_path / "paged.json", "20 %") == 1
    assert "wrong output, refused: 20 %, batch 2, up to 32 tokens: error 1" in capsys.readouterr().err


def test_the_table_has_microseconds_and_ratios_by_baseline():
    medians = {paged.SDPA: 3.0e-6, "20 %": 2.0e-6, "20 % x int8": 1.5e-6}
    methods = {name: {"call": {"median": 9.0}, "graph": {"median": value}} for name, value in medians.items()}
    rows = {"1 x 64": {"methods": methods}, "8 x 64": {"skipped": "too large"}}
    (table,) = paged.tables({"rows": rows})
    assert table.rows[0] == ("1 x 64", "3", "-", "2", "2", "-", "1.50  2.00  -", "-  -  -")
    assert table.rows[1][:2] == ("8 x 64", "too large")
    assert {len(line) for line in table.rows} == {len(table.headings)}

"""A rehearsal of what a GPU is lent for, so that none of its minutes is lost to a typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import ROOT

pytest.importorskip("triton")
STEPS = ("tests", "attention", "graph", "paged", "ncu", "plans")


def run(out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "REHEARSAL": "1", "PYTHON": sys.executable, **settings}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_step_runs_and_the_goals_come_last(tmp_path: Path) -> None:
    limits = {f"LIMIT_{step}": "300" for step in STEPS}
    done = run(tmp_path, **limits)
    assert done.returncode == 0, done.stdout[-6000:]
    summary = done.stdout.partition("== summary")[2]
    for step in STEPS:
        assert f"{step}: exit 0" in summary
        assert (tmp_path / f"{step}.txt").exists()
    assert "batch 8, joint, int8 keys: >= 2x FlashDecoding" in summary
    for name, rows in {"decode": 2, "graph": 3, "paged": 2, "gpu": 1}.items():
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["rows"]) == rows


def test_a_step_that_runs_out_of_time_stops_no_other(tmp_path: Path) -> None:
    done = run(tmp_path, STEPS="attention ncu", LIMIT_attention="1")
    assert done.returncode == 1
    assert "attention: exit out of time" in done.stdout
    assert "ncu: exit 0" in done.stdout
    assert "graph" not in done.stdout.partition("== summary")[0]

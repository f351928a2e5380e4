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


def stand_in(folder: Path) -> str:
    """A PATH on which ncu prints a launch of the kernel that it is asked about, whatever it is to run."""
    folder.mkdir()
    launch = r"  partials (1, 2, 1)x(128, 1, 1), Context 1, Stream 7\n    Duration    us    12.50\n"
    (folder / "ncu").write_text(f"#!/bin/sh\nprintf '{launch}'\n")
    (folder / "ncu").chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def test_every_step_runs_and_the_goals_come_last(tmp_path: Path) -> None:
    limits = {f"LIMIT_{step}": "300" for step in STEPS}
    done = run(tmp_path, **limits, PATH=stand_in(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout[-6000:]
    summary = done.stdout.partition("== summary")[2]
    for step in STEPS:
        assert f"{step}: exit 0" in summary
        assert (tmp_path / f"{step}.txt").exists()
    assert "partials  12.50 us" in summary
    goals = summary.partition("Goals end to end")[2]
    assert "batch 8, joint, int8 keys: >= 2x FlashDecoding" in goals
    assert len(summary.splitlines()) <= 100
    for name, rows in {"decode": 3, "graph": 5, "paged": 2, "gpu": 3, "ncu": 2}.items():
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["rows"]) == rows


def test_a_step_that_runs_out_of_time_stops_no_other(tmp_path: Path) -> None:
    done = run(tmp_path, STEPS="attention ncu", LIMIT_attention="1")
    assert done.returncode == 1
    assert "attention: exit out of time" in done.stdout
    assert "ncu: exit 0" in done.stdout
    assert "graph" not in done.stdout.partition("== summary")[0]

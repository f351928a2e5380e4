"""What the compiler makes of the kernels. The interpreter that other tests run under would not compile them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import ROOT
from benchmarks.speed.run import main

pytest.importorskip("triton")
METHODS = ("grouped", "joint, int8 keys", "commuting, 4 bits")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings its assembler for x86-64 alone")
def test_no_register_is_spilled_where_latents_are_whole_blocks(tmp_path: Path) -> None:
    out = tmp_path / "resources.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.speed", "resources", "--out", str(out), "--methods", *METHODS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {f"{name}, {rank}" for name in METHODS for rank in (192, 208)}
    for row in rows.values():
        assert {kernel["kernel"] for kernel in row["kernels"]} >= {"partials", "outputs"}
        if row["rank"] == 192:
            assert not any(kernel["spilled"] or kernel["local"] for kernel in row["kernels"])
        assert all(kernel["shared"] <= 227 * 1024 for kernel in row["kernels"])


def test_interpreted_kernels_are_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["resources", "--out", str(tmp_path / "resources.json")]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err

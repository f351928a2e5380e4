"""The kernels compile for a GPU, and fit in its shared memory. The interpreter would not notice what Triton refuses."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

H100_SHARED = 232448  # bytes that a program can have


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings its assembler for x86-64 alone")
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("compile_program.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == {"scores", "partials", "outputs", "parameters", "codes"}
    assert all(int(shared) <= H100_SHARED for _, shared in lines), done.stdout

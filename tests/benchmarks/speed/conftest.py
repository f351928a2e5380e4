from __future__ import annotations

import json

import pytest

from benchmarks.speed import decode
from benchmarks.speed.problem import Shape
from benchmarks.speed.run import main


@pytest.fixture(scope="session")
def run_decode():
    """Runs the decode benchmark on a tiny layer, with results in a file."""

    def run(path, *more: str) -> int:
        cells = ["--lengths", "96", "160", "--batches", "2"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "SHAPE", Shape(q_heads=8, kv_heads=4, head_dim=32))
            return main(["decode", "--quick", "--device", "cpu", *cells, "--out", str(path), *more])

    return run


@pytest.fixture(scope="session")
def decoded(tmp_path_factory, run_decode):
    """What it measures."""
    path = tmp_path_factory.mktemp("decode") / "decode.json"
    assert run_decode(path) == 0
    return json.loads(path.read_text())

"""Which library of CPU kernels is loaded, for which instructions, and with whose OpenMP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cskv.attention.cpu import library

IS_BUILT = any(Path(library.__file__).parent.glob("_kernels*.so"))
needs_library = pytest.mark.skipif(not IS_BUILT, reason="the CPU kernels are not built")
PROGRAM = """
import json, sys
import torch
from pathlib import Path
from cskv.attention.cpu.library import lacking, library

torch.ones(64, 64) @ torch.ones(64, 64)
found, maps = library(), Path("/proc/self/maps")
parts = [line.split()[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
print(json.dumps({
    "lacking": lacking(),
    "name": found and found.name,
    "built": found and found.built,
    "is_threaded": found and found.is_threaded,
    "openmp": sorted({part for part in parts if "libgomp" in part or "libomp" in part or "libiomp" in part}),
}))
"""


def start(most: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != library.VARIABLE}
    if most is not None:
        environment[library.VARIABLE] = most
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)


def report(most: str | None) -> dict[str, Any]:
    done = start(most)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def best() -> dict[str, Any]:
    """What a process finds that nothing was asked of."""
    return report(None)


def test_levels_grow() -> None:
    assert library.LEVELS == ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


@needs_library
def test_the_best_level_that_was_built_and_that_the_processor_has(best: dict[str, Any]) -> None:
    assert best["lacking"] is None
    assert best["name"] in best["built"]
    assert best["built"] == [level for level in library.LEVELS if level in best["built"]]
    assert best["built"][0] == "baseline"


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_openmp_is_torchs(best: dict[str, Any]) -> None:
    if not best["is_threaded"]:
        pytest.skip("built without OpenMP")
    assert len(best["openmp"]) == 1, best["openmp"]
    assert "torch" in best["openmp"][0]


@needs_library
@pytest.mark.parametrize("most", ["baseline", "avx2"])
def test_the_variable_picks_a_lower_level(best: dict[str, Any], most: str) -> None:
    below = [level for level in best["built"] if library.LEVELS.index(level) <= library.LEVELS.index(most)]
    highest = min(below[-1], best["name"], key=library.LEVELS.index)
    assert report(most) == best | {"name": highest}


def test_the_variable_switches_the_library_off() -> None:
    found = report("off")
    assert (found["name"], found["lacking"]) == (None, library.SWITCHED_OFF)


def test_an_empty_variable_is_none(best: dict[str, Any]) -> None:
    assert report("") == best


def test_an_unknown_level_is_one_line() -> None:
    done = start("sse9")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "cskv.errors.ConfigError: CSKV_CPU_KERNELS is 'sse9'; expected the highest level to use, baseline, avx2, "
        "avx512, avx512_bf16, amx, or off"
    )


@pytest.fixture
def another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library is looked for in a folder that is empty."""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    return tmp_path


@pytest.mark.usefixtures("another_folder")
def test_a_library_that_was_not_built() -> None:
    assert library.library() is None
    assert library.lacking() == library.MISSING


def test_a_library_that_cannot_be_loaded(another_folder: Path) -> None:
    (another_folder / "_kernels.so").write_bytes(b"no library")
    assert library.library() is None
    assert "cannot be loaded, install cskv again: " in str(library.lacking())

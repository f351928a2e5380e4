"""`setup.py` builds the CPU kernels where it can, and a pure wheel where it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("setuptools.command.bdist_wheel", reason="setuptools is missing, or too old to build wheels")
ROOT = Path(__file__).parents[3]
PACKAGE = Path("src", "cskv", "attention", "cpu")
# Compiles all but AMX, to nothing, and writes down how it was called.
COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in *amx*) echo "cc: error: what is amx?" >&2; exit 1;; esac
case "$*" in *-fsyntax-only*) exit;; esac
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compilers of these tests are shell scripts")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a build reads, in a folder of its own."""
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", tree / "src", ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    return path


def build(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CSKV_BUILD_KERNELS")}
    done = subprocess.run(
        [sys.executable, "setup.py", *command], cwd=tree, env=environment | variables, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    return done


def wheel(tree: Path) -> tuple[str, list[str]]:
    """The tag of the one wheel, and the files in it."""
    (path,) = (tree / "dist").glob("*.whl")
    return path.stem.split("-", 2)[2], ZipFile(path).namelist()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CSKV_BUILD_KERNELS": "0"}, "CSKV_BUILD_KERNELS=0 switches it off"),
        ({"CXX": "false"}, "baseline: false ended with 1"),
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler: looked for no-such-compiler"),
        ({"PATH": "/no-such-folder"}, "there is no C++ compiler: looked for g++, c++, clang++"),
    ],
)
def test_without_a_compiler_the_wheel_is_pure(tree: Path, variables: dict[str, str], reason: str) -> None:
    done = build(tree, "bdist_wheel", **variables)
    assert done.returncode == 0, done.stderr
    tag, files = wheel(tree)
    assert tag == "py3-none-any"
    assert "cskv/attention/cpu/library.py" in files
    assert not [name for name in files if "kernels" in name and "triton" not in name]
    (line,) = (line for line in done.stderr.splitlines() if "_kernels" in line)
    assert line.endswith(reason)


def test_a_level_that_the_compiler_rejects_is_left_out(tree: Path, compiler: Path) -> None:
    done = build(tree, "bdist_wheel", CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    tag, files = wheel(tree)
    assert tag.startswith("py3-none-")
    assert not tag.endswith("any")
    assert "cskv/attention/cpu/_kernels.so" in files
    (library,) = (line for line in compiler.with_suffix(".log").read_text().splitlines() if "library.cpp" in line)
    assert "-DBUILT_AMX" not in library
    if platform.machine() == "x86_64":
        assert all(f"-DBUILT_{level}" in library for level in ("AVX2", "AVX512", "AVX512_BF16"))
        assert "CPU kernels without amx: cc: error: what is amx?" in done.stderr
        assert "CPU kernels for baseline, avx2, avx512, avx512_bf16" in done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="has one level alone")
def test_kernels_that_are_wanted_have_all_levels(tree: Path, compiler: Path) -> None:
    done = build(tree, "bdist_wheel", CXX=str(compiler), CSKV_BUILD_KERNELS="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: amx: cc: error: what is amx?"


def test_kernels_that_are_wanted_and_cannot_be_built_are_an_error(tree: Path) -> None:
    done = build(tree, "bdist_wheel", CXX="no-such-compiler", CSKV_BUILD_KERNELS="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: there is no C++ compiler: looked for no-such-compiler"


def test_a_wish_that_is_unknown_is_an_error(tree: Path) -> None:
    done = build(tree, "bdist_wheel", CSKV_BUILD_KERNELS="yes")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: CSKV_BUILD_KERNELS is 'yes'; expected 0 or 1, or nothing"


def test_the_library_lies_beside_the_sources_in_an_editable_install(tree: Path, compiler: Path) -> None:
    (tree / PACKAGE / "_kernels.abi3.so").touch()
    assert build(tree, "build_ext", "--inplace", CXX=str(compiler)).returncode == 0
    assert [path.name for path in (tree / PACKAGE).glob("*.so")] == ["_kernels.so"]
    assert build(tree, "build_ext", "--inplace", CXX="false").returncode == 0
    assert not [*(tree / PACKAGE).glob("*.so")], "an old library does not outlive a build that failed"


def test_a_source_distribution_has_the_sources(tree: Path) -> None:
    done = build(tree, "sdist", CSKV_BUILD_KERNELS="0")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    kernels = [Path(PACKAGE, "kernels", source.name) for source in (ROOT / PACKAGE / "kernels").iterdir()]
    assert len(kernels) >= 2
    assert {Path("setup.py"), *kernels} <= packed

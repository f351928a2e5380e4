"""`cskv export`: what it prints, where it finds the base model, and its one-line mistakes."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoModelForCausalLM

import cskv
from cskv.compression.initialise import initialise
from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake
from tests.harness.support import CHECKPOINT
from tests.vllm.support import as_hub_cache

CONFIG = cskv.CSKVConfig(k_density=0.25, v_density=0.25, window=8, group=4, sinks=2, init="svd")


@pytest.fixture(scope="session")
def small_adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that names its base model's folder."""
    folder = tmp_path_factory.mktemp("adapters") / "small"
    initialise(AutoModelForCausalLM.from_pretrained(model_folder), CONFIG).save_pretrained(folder)
    return folder


def test_the_bundled_model_is_exported(run: Run, tmp_path: Path) -> None:
    initialise(AutoModelForCausalLM.from_pretrained(CHECKPOINT), CONFIG).save_pretrained(tmp_path / "adapter")
    result = run("export", "adapter", "--model-path", CHECKPOINT, "--out", "served models/a")
    report = last_json(result)
    assert report["command"] == "export"
    assert report["architecture"] == "CSKVLlamaForCausalLM"
    assert (report["uncompressed_bytes_per_token"], report["bytes_per_token"], report["ratio"]) == (4096, 1024.0, 0.25)
    assert "4,096 bytes per token uncompressed, 1,024 compressed (25.0%), in bfloat16" in result.stdout
    (line,) = re.findall(r"^serve +(python .*)$", result.stdout, re.MULTILINE)
    assert shlex.split(line) == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "served models/a"]
    assert (tmp_path / "served models" / "a" / "cskv" / "model.safetensors").is_file()


def test_the_adapter_names_its_base_and_weights_are_linked(
    run: Run, small_adapter: Path, model_folder: Path, tmp_path: Path
) -> None:
    result = run("export", small_adapter, "-o", "served")
    assert last_json(result)["base"] == str(model_folder)
    assert "1 file(s) hard-linked" in result.stdout
    weights = tmp_path / "served" / "model.safetensors"
    assert weights.stat().st_ino == (model_folder / "model.safetensors").stat().st_ino
    result = run("export", small_adapter, "-o", "served", "--overwrite", "--copy")
    assert last_json(result)["copied"] == ["model.safetensors"]
    assert "1 file(s) copied" in result.stdout
    assert weights.stat().st_nlink == 1


def test_left_out_weights_are_named(run: Run, small_adapter: Path, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
    result = run("export", small_adapter, "--model-path", "base", "--out", "served")
    assert last_json(result)["left_out"] == ["pytorch_model.bin"]
    assert re.search(r"^left out +pytorch_model.bin$", result.stdout, re.MULTILINE)


def test_who_keeps_exact_tokens_is_told_what_it_costs(run: Run, small_adapter: Path, tmp_path: Path) -> None:
    result = run("export", small_adapter, "--out", "a")
    assert not last_json(result)["prefix_caching"]
    assert "the first 2 and the newest 8 to 11 tokens of a request are kept exactly" in result.stdout
    assert "`--window 0 --group 1 --sinks 0` allows it" in result.stdout
    result = run("export", small_adapter, "--out", "c", "--window", 0, "--group", 1)
    assert "the first 2 tokens of a request are kept exactly" in result.stdout
    result = run("export", small_adapter, "--out", "b", "--window", 0, "--group", 1, "--sinks", 0)
    assert (last_json(result)["prefix_caching"], last_json(result)["sinks"]) == (True, 0)
    assert "prefix" not in result.stdout.rpartition("\n{")[0]
    settings = cskv.CSKVAdapter.from_pretrained(tmp_path / "b" / "cskv").config
    assert (settings.window, settings.group, settings.sinks) == (0, 1, 0)


def test_the_base_may_be_on_the_hub(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshots = [as_hub_cache(model_folder, tmp_path / "hub", "someone/tiny", digit * 40) for digit in "12"]
    (snapshots[0].parent.parent / "refs").mkdir()
    (snapshots[0].parent.parent / "refs" / "main").write_text("2" * 40)
    adapter = initialise(AutoModelForCausalLM.from_pretrained(model_folder), CONFIG)
    adapter.base = dataclasses.replace(adapter.base, name="someone/tiny", revision="1" * 40)
    adapter.save_pretrained(tmp_path / "adapter")
    report = last_json(run("export", "adapter", "--out", "served"))
    assert report["base"] == str(snapshots[0])  # the revision that it was made for, not the newest
    weights = tmp_path / "served" / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.stat().st_ino == (snapshots[0] / "model.safetensors").resolve().stat().st_ino
    line = mistake(run("export", "adapter", "--model-path", "someone/else", "--out", "other"))
    assert "no model folder 'someone/else' here, and the hub gave none" in line


def test_mistakes_are_one_line_and_write_nothing(
    run: Run, small_adapter: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_adapter, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "model.safetensors", 100)
    nameless = cskv.CSKVAdapter.from_pretrained(small_adapter)
    nameless.base = dataclasses.replace(nameless.base, name="")
    nameless.save_pretrained(tmp_path / "nameless")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for message, *args in (
        ("no adapter folder 'nowhere' here", "nowhere", "--out", "served"),
        ("is not a cskv adapter", model_folder, "--out", "served"),
        ("is truncated or corrupted", "damaged", "--out", "served"),
        ("does not name its base model; give it with --model-path", "nameless", "--out", "served"),
        ("model folder './nowhere' does not exist", small_adapter, "--model-path", "./nowhere", "--out", "served"),
        ("is an adapter; expected the folder of its base", small_adapter, "-m", small_adapter, "--out", "served"),
        ("hidden_size 32, this model has 256", small_adapter, "--model-path", CHECKPOINT, "--out", "served"),
        ("full is not empty; choose another folder", small_adapter, "--out", "full"),
        ("full holds something other than an earlier export", small_adapter, "--out", "full", "--overwrite"),
        ("is, lies in or holds", "damaged", "--out", "damaged/served"),
        ("is, lies in or holds", small_adapter, "--out", model_folder / "served"),
        ("group is 0", small_adapter, "--out", "served", "--group", 0),
    ):
        assert message in mistake(run("export", *args)), message
    assert sorted(tmp_path.rglob("*")) == before
    assert sorted(model_folder.rglob("served")) == []


def test_ctrl_c_leaves_nothing_behind(
    run: Run, small_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copyfile(_source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    result = run("export", small_adapter, "--out", "outputs/served")
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\n"
    assert list((tmp_path / "outputs").iterdir()) == []

"""Models in GGUF files on the command line: from the file to text, and to a checkpoint that vLLM serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cskv
from cskv.models.gguf import load_gguf
from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake

pytest.importorskip("gguf")
from tests.gguf_files import tiny_llama, write_gguf

WINDOW = ("--window", "4", "--group", "4")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", tiny_llama())


@pytest.fixture
def adapter(gguf_file: Path, tmp_path: Path) -> Path:
    settings = cskv.CSKVConfig(0.5, 0.5, window=4, group=4, init="svd")
    cskv.initialise(load_gguf(gguf_file), settings).save_pretrained(tmp_path / "A")
    return tmp_path / "A"


def test_from_a_file_to_text(run: Run, gguf_file: Path, text_file: Path) -> None:
    folder = gguf_file.parent
    calibrated = last_json(
        run("calibrate", "-m", gguf_file, "--dataset", text_file, "--max-seq-len", "64", "--num-samples", "2", *WINDOW)
    )
    assert calibrated["statistics"] == "outputs/calibration/tiny.Q8_0/statistics.safetensors"
    given = ("--model-path", folder, "--gguf-file", gguf_file.name)
    trained = last_json(run("train", *given, "--use-init-params", *WINDOW))
    assert trained["model"] == str(gguf_file)
    inspected = run("inspect", trained["adapter"])
    assert f"base model  {gguf_file} (llama, 2 layers, hidden size 64)" in inspected.stdout
    assert last_json(inspected)["base_model"]["name"] == str(gguf_file)
    said = last_json(run("generate", "--adapter", trained["adapter"], "-p", "The cache", "-n", "8", "--chat"))
    assert (said["model"], said["compressed"], said["new_tokens"]) == (str(gguf_file), True, 8)
    again = last_json(
        run("generate", "-m", folder, "-p", "The cache", "-n", "8", "--chat", *WINDOW, "--use-init-params")
    )
    assert again["text"] == said["text"]


def test_dtype_auto_is_bfloat16(run: Run, gguf_file: Path, text_file: Path) -> None:
    options = ("-t", "perplexity", "--text", text_file, "--texts", "1", "--text-tokens", "64", "-o", "r.json")
    last_json(run("evaluate", "-m", gguf_file, *options))
    assert '"dtype": "bfloat16"' in Path("r.json").read_text()


def test_the_base_is_exported_dequantised(run: Run, gguf_file: Path, adapter: Path, tmp_path: Path) -> None:
    result = run("export", adapter, "-o", "served")
    report = last_json(result)
    assert (report["base"], report["linked"], report["copied"]) == (str(gguf_file), [], ["model.safetensors"])
    assert "weights     1 file(s) dequantised" in result.stdout
    assert (tmp_path / "served" / "model.safetensors").stat().st_nlink == 1
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    known = load_gguf(gguf_file).state_dict()
    assert all(torch.equal(tensor, known[name]) for name, tensor in served.state_dict().items())
    assert not list(tmp_path.glob(".served*"))


def test_mistakes_are_one_line(run: Run, gguf_file: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("This is no model.")
    (tmp_path / "notes.txt").write_text("This is no model.")
    (tmp_path / "short.gguf").write_bytes(gguf_file.read_bytes()[:-1000])
    write_gguf(tmp_path / "odd.gguf", tiny_llama(), architecture="clip")
    for message, *options in (
        ("'nowhere.gguf' does not exist", "-m", "nowhere.gguf"),
        ("/nowhere.gguf' does not exist", "-m", gguf_file.parent, "--gguf-file", "nowhere.gguf"),
        ("text.gguf is no GGUF file", "-m", "text.gguf"),
        ("notes.txt is no GGUF file", "-m", "notes.txt"),
        ("short.gguf is truncated: it has", "-m", "short.gguf"),
        ("architecture clip is not supported", "-m", "odd.gguf"),
        ("holds 3 GGUF files; name one with --gguf-file", "-m", tmp_path),
        ("give a folder or hub id with it", "-m", gguf_file, "--gguf-file", "a.gguf"),
    ):
        assert message in mistake(run("analyze", "--weights-only", *options)), options
        assert message in mistake(run("generate", "--use-init-params", "-p", "hi", *options)), options
    assert "give that with --model-path" in mistake(run("generate", "-a", adapter, "-p", "hi", "--gguf-file", "a.gguf"))
    assert "is truncated" in mistake(run("export", adapter, "-m", "short.gguf", "-o", "served"))
    named = ("-m", ".", "--gguf-file", "nowhere.gguf")
    assert "/nowhere.gguf' does not exist" in mistake(run("export", adapter, *named, "-o", "served"))
    assert not list(tmp_path.glob("*served*"))

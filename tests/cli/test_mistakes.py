"""Whatever a user gets wrong is one line and exit code 2, and found before the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    import cskv

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    config = cskv.CSKVConfig(k_density=0.5, v_density=0.5, window=4, group=4, init="svd")
    cskv.initialise(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(folder)
    return folder


def edited(adapter: Path, place: Path, keys: tuple[str, ...], value: Any) -> Path:
    """A copy of an adapter folder with one entry of its `config.json` replaced."""
    shutil.copytree(adapter, place)
    description = json.loads((place / "config.json").read_text())
    *parents, last = keys
    entry = description
    for key in parents:
        entry = entry[key]
    entry[last] = value
    (place / "config.json").write_text(json.dumps(description))
    return place


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format_version",), "1", "format_version '1'; expected a whole number"),
        (("format_version",), True, "format_version True; expected a whole number"),
        (("compression",), [1], "got list in place of settings"),
        (("compression", "k_bits"), 4.0, "k_bits is 4.0; expected 2 to 8"),
        (("compression", "mixed_widths"), "no", "mixed_widths is 'no'; expected true or false"),
        (("compression", "window"), 4.0, "window is 4.0; expected a whole number"),
        (("compression", "init"), ["svd"], "init is ['svd']; expected one of"),
        (("metrics",), [1], "metrics [1] (expected dict)"),
        (("ranks", "0", "k"), 8.0, "8.0 (expected int)"),
        (("ranks", "0", "k"), "8", "'8' (expected int)"),
        (("ranks",), [], "is damaged"),
        (("widths",), {"0": {"k": [[4.0, 8]]}}, "4.0 (expected int)"),
        (("base_model", "name"), 7, "the base model's name 7 (expected str)"),
        (("base_model", "hidden_size"), "32", "hidden_size '32' (expected int)"),
        (("base_model", "revision"), 1, "revision 1 (expected str | None)"),
        (("base_model",), None, "is damaged"),
    ],
)
def test_wrong_types_in_an_adapters_config(
    run: Run, adapter: Path, tmp_path: Path, keys: tuple[str, ...], value: Any, message: str
) -> None:
    assert message in mistake(run("inspect", edited(adapter, tmp_path / "edited", keys, value)))


def test_figures_that_json_cannot_hold_are_null(run: Run, adapter: Path, tmp_path: Path) -> None:
    folder = edited(adapter, tmp_path / "edited", ("metrics",), {"loss": float("nan"), "of": [float("inf"), 1.5]})
    assert last_json(run("inspect", folder))["metrics"] == {"loss": None, "of": [None, 1.5]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "'--seed'"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "1e-300"], "temperature 1e-300; expected"),
        (["--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["--window", "9" * 23], "--window is 999"),
        (["--cache-implementation", "foo"], "'foo', which cannot hold compressed tokens"),
        (["--cache-implementation", "quantized"], "'quantized', which cannot hold compressed tokens"),
        (["--cache-implementation", "paged"], "'paged', which cannot hold compressed tokens"),
        (["--device", "meta"], "device 'meta' holds no data"),
        (["--device-map", "meta"], "device 'meta' holds no data"),
        (["--device-map", "foo"], "device 'foo' cannot be used here"),
    ],
)
def test_options_of_generate_out_of_range(run: Run, adapter: Path, options: list[str], message: str) -> None:
    assert message in mistake(run("generate", "--adapter", adapter, "-p", "hi", "-n", "2", *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--use-origin-model", "--cache-implementation", "paged", "-p", "hi"], "'paged'; expected"),
        (["--use-init-params", "--lines", "100001"], "at most 100000"),
    ],
)
def test_options_of_generate_without_an_adapter(run: Run, model_folder: Path, options: list[str], message: str) -> None:
    assert message in mistake(run("generate", "--model-path", model_folder, *options))


def test_a_static_cache_of_the_uncompressed_model_is_reported(run: Run, model_folder: Path) -> None:
    options = ("--use-origin-model", "--cache-implementation", "static", "-p", "hi", "-n", "2")
    assert last_json(run("generate", "-m", model_folder, *options))["cache"]["tokens"] == 3


def test_absurd_lengths_are_refused(run: Run, adapter: Path, model_folder: Path) -> None:
    assert "'--tokens'" in mistake(run("inspect", adapter, "--tokens", "9" * 20))
    assert "--num-samples is 999" in mistake(run("calibrate", "-m", model_folder, "--num-samples", "9" * 20))
    assert "--lines is 999" in mistake(run("evaluate", "-m", model_folder, "-t", "lines", "--lines", "9" * 20))
    assert "--depths is inf" in mistake(run("evaluate", "-m", model_folder, "--depths", "1e400"))


def test_an_adapter_in_place_of_a_model_is_refused(run: Run, adapter: Path, text_file: Path) -> None:
    for command in ("train", "analyze"):
        options = ("--init", "svd", "--use-init-params") if command == "train" else ("--weights-only",)
        assert f"{adapter} is an adapter; give the model" in mistake(run(command, "-m", adapter, *options))


def test_a_model_whose_config_is_damaged_is_one_line(run: Run, model_folder: Path, tmp_path: Path) -> None:
    broken = edited(model_folder, tmp_path / "broken", ("num_attention_heads",), "four")
    assert f"cannot load the model {broken}" in mistake(run("analyze", "-m", broken, "--weights-only"))


def test_outputs_that_cannot_be_written_are_found_before_the_work(
    run: Run, adapter: Path, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("cskv.cli.loading.load_model", work)
    monkeypatch.setattr("cskv.cli.loading.load_tokenizer", work)
    monkeypatch.setattr("cskv.report.gather", work)
    monkeypatch.setattr("cskv.adapter.adapter.CSKVAdapter.from_pretrained", work)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "spectra.png").mkdir(parents=True)
    model = ("--model-path", model_folder)
    before = sorted(tmp_path.rglob("*"))
    for message, *options in (
        ("folder: it is a folder", "calibrate", *model, "--output", "folder"),
        ("cannot write file/s: ", "calibrate", *model, "--output", "file/s"),
        ("cannot write file/config.json", "train", *model, "--use-init-params", "--output", "file"),
        ("folder: it is a folder", "evaluate", *model, "--output", "folder"),
        ("cannot write file/r.json", "evaluate", *model, "--output", "file/r.json"),
        ("spectra.png: it is a folder", "analyze", *model, "--weights-only", "--output", "folder"),
        ("cannot write file/index.html", "report", "file", "--out", "file"),
        ("file is a file", "export", adapter, "--out", "file"),
        ("cannot write /proc/nowhere/config.json", "export", adapter, "--out", "/proc/nowhere"),
    ):
        assert message in mistake(run(*options)), options
    assert sorted(tmp_path.rglob("*")) == before


def test_training_goes_on_without_its_log(run: Run, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    command = ("train", "-m", model_folder, "--init", "svd", "--window", "4", "--group", "4", "--output", "T")
    command += ("--dataset", text_file, "--num-samples", "2", "--max-seq-len", "32")
    first = last_json(run(*command))
    log = tmp_path / "T" / "train_log.jsonl"
    log.unlink()
    result = run(*command)
    again = last_json(result)
    assert again["loss"] == first["loss"]
    assert "initial_loss" not in again
    assert "initial losses are not recorded" in result.stderr
    log.write_text('{"step": "1"}\n')
    assert "train_log.jsonl has a line that is no record of a step" in mistake(run(*command))

"""What `--model_args` may say. The harness need not be installed for these."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cskv
from cskv import harness
from cskv.cli.app import app
from cskv.harness.arguments import MISSING, check_arguments, check_settings, find_compressor
from tests.cli.support import mistake
from tests.harness.support import CHECKPOINT

KNOWN = ("pretrained", "dtype", "max_length", "backend", "peft")


def test_an_adapter_brings_its_base_model(adapters: dict[str, str]) -> None:
    found = find_compressor(adapters["low"], None, None, None, None)
    assert found.adapter is not None
    assert (found.base, found.name, found.revision) == (CHECKPOINT, adapters["low"], "main")
    assert (found.window, found.group) == (8, 8)
    assert find_compressor(adapters["low"], "another", "v2", None, None).base == "another"


def test_a_window_replaces_the_adapters_without_changing_it(adapters: dict[str, str]) -> None:
    adapter = cskv.CSKVAdapter.from_pretrained(adapters["low"])
    found = find_compressor(adapter, None, None, 4, None)
    assert found.adapter is not None
    assert (found.adapter.config.window, found.adapter.config.group, found.window) == (4, 8, 4)
    found = find_compressor(adapter, None, sinks=2)
    assert (found.adapter.config.sinks, found.sinks, found.window) == (2, 2, 8)
    assert (adapter.config.window, adapter.config.group) == (8, 8)


@pytest.mark.parametrize("nothing", ["none", "None", None])
def test_no_adapter_is_the_uncompressed_model(nothing: str | None) -> None:
    found = find_compressor(nothing, "base", None, 4, 2)
    assert found.adapter is None
    assert (found.base, found.window, found.group, found.sinks) == ("base", 4, 2, cskv.CSKVConfig().sinks)


def test_what_is_missing_or_misplaced_is_one_line(adapters: dict[str, str], tmp_path: Path) -> None:
    unnamed = cskv.CSKVAdapter.from_pretrained(adapters["low"])
    unnamed.base = type(unnamed.base)("", "llama", 256, 4)
    for given, message in (
        ((MISSING, "base"), "no adapter was given; expected adapter=FOLDER_OR_HUB_ID"),
        (("none", None), "adapter=none names no base model"),
        ((str(tmp_path / "absent"), None), "no adapter folder"),
        ((CHECKPOINT, None), "is not a cskv adapter"),
        ((MISSING, adapters["low"]), "is an adapter; give it as adapter="),
        (("none", adapters["low"]), "is an adapter; give it as adapter="),
        ((unnamed, None), "does not name its base model"),
    ):
        with pytest.raises(cskv.CSKVError, match=message) as error:
            find_compressor(*given, None, None, None)
        assert "\n" not in str(error.value)
    with pytest.raises(cskv.ConfigError, match="window is -1"):
        find_compressor(adapters["low"], None, None, -1, None)


def test_unknown_arguments_are_refused_and_known_ones_are_not() -> None:
    check_arguments({"dtype": "float32", "max_length": 512, "load_in_4bit": True, "peft": None}, KNOWN)
    with pytest.raises(cskv.ConfigError, match="unknown argument max_lenght=512 .* did you mean max_length?"):
        check_arguments({"max_lenght": 512}, KNOWN)
    for name in ("peft", "delta", "autogptq", "gptqmodel", "tp_plan", "mixed_precision_dtype"):
        with pytest.raises(cskv.ConfigError, match=f"{name}=x does not go with a compressed cache"):
            check_arguments({name: "x"}, KNOWN)
    check_arguments({"dtype": "float32", "parallelize": False}, (*KNOWN, "parallelize"), "parallel")
    with pytest.raises(cskv.ConfigError, match="reading=parallel is for a model on one device"):
        check_arguments({"parallelize": True}, KNOWN, "parallel")
    with pytest.raises(cskv.ConfigError, match="backend is 'seq2seq'; expected causal"):
        check_arguments({"backend": "seq2seq"}, KNOWN)


@pytest.mark.parametrize("size", ["auto", "auto:4", 0, "two"])
def test_batch_sizes_are_numbers(size: object) -> None:
    check_settings(batch_size=3)
    check_settings(batch_size="3")
    why = "which tries .* give a number" if "auto" in str(size) else "expected a whole number"
    with pytest.raises(cskv.ConfigError, match=f"batch_size is {size!r}.* {why}"):
        check_settings(batch_size=size)


def test_ways_of_reading_have_names() -> None:
    for wrong in ({"protocol": "x"}, {"reading": "x"}, {"question_tokens": 0}):
        with pytest.raises(cskv.ConfigError, match=f"{next(iter(wrong))} is "):
            check_settings(**wrong)


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(cskv.CSKVError, match="pip install 'cskv\\[lm-eval\\]'"):
        harness.run(["ls", "tasks"])
    assert "pip install 'cskv[lm-eval]'" in mistake(CliRunner().invoke(app, ["lm-eval", "--help"]))


def test_the_command_passes_everything_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[list[str]] = []
    monkeypatch.setattr(harness, "run", lambda args: passed.append(list(args)))
    args = ["run", "--model_args", "adapter=my_adapter,dtype=float32", "--tasks", "a_b", "-L", "3", "--help", "--", "x"]
    for given in (args, args[1:], []):
        assert CliRunner().invoke(app, ["lm-eval", *given]).exit_code == 0
    assert passed == [args, args[1:], []]


def test_importing_cskv_does_not_import_the_harness() -> None:
    import subprocess

    code = "import sys, cskv, cskv.harness, cskv.cli.app; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

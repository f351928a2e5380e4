"""`cskv evaluate` on a tiny random model: what it measures, keeps, resumes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cskv.cli.settings import numbers, words
from cskv.errors import ConfigError
from cskv.evaluation.results import read_run
from tests.cli.support import last_json, mistake

pytest.importorskip("wonderwords")

SMALL = ["--cases", "2", "--lines", "2", "--max-new-tokens", "2", "--texts", "2", "--text-tokens", "96"]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_text("".join(f"sentence {index} of a text of one's own.\n" for index in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cskv.cli.loading import load_model
    from cskv.compression.initialise import initialise
    from cskv.config import CSKVConfig

    path = tmp_path_factory.mktemp("adapters") / "quarter"
    model = load_model(str(model_folder))
    initialise(model, CSKVConfig(0.25, 0.25, init="svd", window=8, group=8)).save_pretrained(path)
    return path


def test_adapters_and_baselines_side_by_side(run, adapter, book, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # a table that is not cut
    target = tmp_path / "results.json"
    methods = ["--adapter", f"Mine={adapter}", "-b", "svd@0.5", "--sinks", 0]
    result = run("evaluate", *methods, "--text", book, "--seed", "0,1", "-o", target, *SMALL)
    told = last_json(result)
    assert told["results"] == str(target)
    assert told["methods"] == ["Mine 25 %", "SVD 50 %", "uncompressed"]
    found = read_run(target)
    assert len(found.rows) == told["rows"] == 2 * 3 * (2 + 2)
    assert found.model["type"] == "llama"
    assert found.environment["torch"]
    assert found.methods["Mine 25 %"]["source"] == str(adapter)
    ratios = {row["method"]: row["cache"]["ratio"] for row in found.rows if row["task"] == "perplexity"}
    assert ratios["uncompressed"] == 1.0
    assert ratios["Mine"] < ratios["SVD"] < 1.0
    assert "Mine 25 %" in result.stderr
    lines = [line for line in result.stderr.splitlines() if " s (" in line]
    assert len(lines) == 3 * 2 * (2 + 1)  # a line per measurement, without a terminal
    assert lines[0].startswith("uncompressed lines 2 in-prefill: ")
    assert lines[-1].endswith("s (18 of 18)")
    assert "cskv report" in result.stderr


def test_a_run_goes_on_and_is_never_overwritten(run, adapter, book, tmp_path):
    target = tmp_path / "results.json"
    arguments = ["evaluate", "-a", adapter, "--text", book, "-t", "perplexity", "-o", target, *SMALL]
    assert last_json(run(*arguments, "--no-uncompressed"))["rows"] == 2
    before = read_run(target).rows
    result = run(*arguments)
    assert last_json(result)["rows"] == 4
    assert "going on with" in result.stderr
    assert read_run(target).rows[:2] == before
    kept = target.read_bytes()
    assert "results are never overwritten" in mistake(run(*arguments, "--texts", "1"))
    assert target.read_bytes() == kept


def test_without_an_output_every_complete_run_gets_a_file_of_its_own(run, adapter, book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", "-a", adapter, "--text", book, "-t", "perplexity", "--no-uncompressed", *SMALL]
    first, second = (last_json(run(*arguments))["results"] for _ in range(2))
    assert first != second
    assert Path(first).parent == Path(second).parent == Path("outputs/evaluation/tiny")


def test_published_files_are_asked_as_they_are(run, model_folder, tmp_path):
    from cskv.data.lines import make_case

    path = tmp_path / "lines.jsonl"
    cases = [make_case(3, seed) for seed in (7, 8)]
    rows = [{"prompt": c.prompt, "expected_number": c.expected, "random_idx": [c.key], "num_lines": 3} for c in cases]
    path.write_text("\n".join(map(json.dumps, rows)))
    target = tmp_path / "results.json"
    last_json(run("evaluate", "-m", model_folder, "-t", "lines", "--lines-file", path, "-o", target, *SMALL))
    found = read_run(target).rows
    assert {row["size"] for row in found} == {3}
    assert [output["answers"] for output in found[0]["outputs"]] == [[str(case.expected)] for case in cases]


def test_departures_are_shown_in_a_table(run, adapter, book, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # a table that is not cut
    target = tmp_path / "results.json"
    arguments = ["-t", "departure", "--text", book, "--generated", "6", "-o", target, *SMALL]
    result = run("evaluate", "-a", f"Mine={adapter}", *arguments)
    assert last_json(result)["rows"] == 2
    assert {(row["task"], row["size"], row["generated"]) for row in read_run(target).rows} == {("departure", 96, 6)}
    assert "equal tokens" in result.stderr


def test_code_is_never_run_unless_it_is_asked_for_by_name(run, model_folder, book, tmp_path, monkeypatch):
    from cskv.data import code, offline

    source = (offline.root() / "textwrap.py").read_text(encoding="utf-8")
    documents = {"train": {"stdlib/textwrap.py": source}, "heldout": {"stdlib/held.py": "held = 1\n" * 3000}}
    monkeypatch.setattr(offline, "documents", lambda split: iter(documents[split].items()))
    monkeypatch.setattr(code, "PARTS", 1)
    for cached in (code.functions, code._heldout):
        cached.cache_clear()
    target = tmp_path / "results.json"
    arguments = ["-m", model_folder, "--tokens", "1500", "--protocol", "in-prefill", "-o", target, *SMALL]
    result = run("evaluate", "-t", "code", *arguments, "--cases", "1")
    assert "what the model writes is run, confined" in result.stderr
    (row,) = read_run(target).rows
    assert (row["task"], row["n"], row["score"]) == ("code", 1, 0.0)
    assert row["outputs"][0]["answers"] == ["textwrap.shorten"]
    for cached in (code.functions, code._heldout):
        cached.cache_clear()
    plain = ["-m", model_folder, "--text", book, "-o", tmp_path / "other.json", *SMALL]
    assert "is run" not in run("evaluate", *plain).stderr
    assert not any(row["task"] == "code" for row in read_run(tmp_path / "other.json").rows)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-t", "chess"], "tasks has 'chess'; expected some of lines"),
        (["--lines", "many"], "--lines has 'many'; expected whole numbers"),
        (["--depths", "0,x"], "--depths has 'x'; expected numbers"),
        (["-b", "lora@0.2"], "there is no baseline 'lora@0.2'"),
        (["-b", "asvd@0.2"], "statistics"),
        (["-b", "streaming@0.5"], "need kvpress"),
        (["-a", "nowhere"], "nowhere"),
        (["--no-uncompressed"], "nothing to measure"),
        (["--chat"], "no chat template"),
        (["-t", "code", "--chat"], "code is completed as a text, not in a chat"),
        (["-t", "vt", "--tokens", "20"], "the shortest prompt of vt takes"),
        (["--lines-file", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_mistakes_are_one_line(run, model_folder, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in mistake(run("evaluate", "-m", model_folder, *SMALL, *arguments))


def test_a_base_model_is_needed(run):
    assert "give the base model with --model-path" in mistake(run("evaluate", "-b", "svd@0.2"))


def test_lists_are_given_again_or_with_commas():
    assert words(["a,b", " c ", "a,"]) == ("a", "b", "c")
    assert numbers("--x", ["1,2", "2", "30"], int) == (1, 2, 30)
    assert numbers("--x", ["0.5"], float) == (0.5,)
    with pytest.raises(ConfigError, match="--x has '1.5'; expected whole numbers"):
        numbers("--x", ["1.5"], int)

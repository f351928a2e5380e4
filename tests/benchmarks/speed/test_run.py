from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.speed import registry, run

ROOT = Path(__file__).parents[3]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile", *ROOT.glob("benchmarks/speed/*.py")]


def commands() -> list[list[str]]:
    """The words behind `python -m benchmarks.speed` wherever one is written down."""
    found = []
    for path in TEXTS:
        for call in re.findall(r"-m benchmarks\.speed +([a-z][^`\n#]*)", path.read_text(encoding="utf-8")):
            found.append([re.sub(r"\$\(.*?\)|\[.*?\]", "", word) for word in shlex.split(call)])
    return [[word for word in words if word] for words in found]


def test_every_command_that_is_written_down_can_be_parsed(tmp_path):
    assert {"decode", "generation", "memory", "paged", "serving", "report"} <= {words[0] for words in commands()}
    for name, *arguments in commands():
        if name != "report" and "--help" not in arguments:
            run.parse(name, importlib.import_module(f"benchmarks.speed.{name}"), arguments)


@pytest.mark.parametrize("name", registry.BENCHMARKS)
def test_every_benchmark_can_be_asked_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as end:
        run.main([name, "--help"])
    assert end.value.code == 0
    assert importlib.import_module(f"benchmarks.speed.{name}").BENCHMARK.quick in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_list_of_benchmarks_and_an_unknown_one(capsys):
    with pytest.raises(SystemExit):
        run.main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in registry.BENCHMARKS)
    with pytest.raises(SystemExit) as end:
        run.main(["speed"])
    assert end.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_what_cannot_be_measured_here_is_one_line(monkeypatch, tmp_path, capsys):
    from benchmarks.speed import serving

    monkeypatch.setattr(serving, "packages_distributions", dict)
    assert run.main(["serving", "--quick", "--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("error: vLLM is not installed")


def outcome(tmp_path, **how) -> tuple[int, dict]:
    """Of a run of three rows, the second of which fails, and what is kept."""
    path = tmp_path / "rows.json"

    def fails():
        raise how.pop("error")

    jobs = {"1": lambda: {"figure": 1}, "2": fails, "3": lambda: {"figure": 3}}
    code = common.run(path, {}, jobs, lambda results: [], seconds=how.pop("seconds", 60), keep_going=True)
    return code, json.loads(path.read_text())["rows"] if path.exists() else {}


def test_a_row_that_fails_does_not_end_a_run_that_keeps_going(tmp_path, capsys):
    code, rows = outcome(tmp_path, error=RuntimeError("no memory"))
    assert (code, sorted(rows)) == (3, ["1", "3"])
    assert rows["3"]["wall_seconds"] >= 0
    assert "not measured: 2: RuntimeError: no memory" in capsys.readouterr().err


def test_a_wrong_output_is_refused_at_the_end_of_a_run_that_keeps_going(tmp_path, capsys):
    code, rows = outcome(tmp_path, error=common.Wrong("2 is off"))
    assert (code, sorted(rows)) == (1, ["1", "3"])
    assert "wrong output, refused: 2 is off" in capsys.readouterr().err


def test_no_row_is_begun_after_the_time_that_was_given(tmp_path, capsys):
    code, rows = outcome(tmp_path, seconds=-1, error=RuntimeError)
    assert (code, rows) == (3, {})
    assert "not measured: 1: TimeoutError: no time left" in capsys.readouterr().err

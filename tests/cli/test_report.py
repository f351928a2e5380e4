from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from cskv.evaluation.spectra import write_csv
from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake
from tests.plots.support import decay
from tests.report.support import small_run

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def lines_only(path: Path, **changes: object) -> None:
    path.parent.mkdir(exist_ok=True)
    run = small_run(path, ("PCA",))
    run.rows = [row for row in run.rows if row["task"] == "lines"]
    run.model.update(changes)
    run.save()


def test_a_folder_becomes_a_page(run: Run, tmp_path: Path) -> None:
    lines_only(tmp_path / "results" / "a.json")
    (tmp_path / "results" / "settings.json").write_text("{}")
    write_csv(decay(1, ("weight",)), tmp_path / "s.csv")
    result = run("report", "results", "s.csv", "--out", "page", "--title", "Mine")
    report = last_json(result)
    assert "settings.json holds no results" in result.stderr
    assert "page/index.html" in result.stdout.splitlines()[0]
    assert report["page"] == "page/index.html"
    assert "<title>Mine</title>" in Path(report["page"]).read_text(encoding="utf-8")
    assert report["rows"] == 24
    assert len(report["figures"]) == 3
    written = sorted([*report["figures"], report["page"], report["table"]])
    assert sorted(str(path) for path in Path("page").iterdir()) == written


def test_different_models_are_one_line(run: Run, tmp_path: Path) -> None:
    lines_only(tmp_path / "results" / "a.json")
    lines_only(tmp_path / "results" / "b.json", fingerprint="another")
    assert "are of different models" in mistake(run("report", "results", "--out", "page"))
    assert not Path("page").exists()


def test_what_holds_no_results_is_one_line(run: Run, tmp_path: Path) -> None:
    assert "cannot read the results nowhere" in mistake(run("report", "nowhere", "--out", "page"))
    (tmp_path / "empty").mkdir()
    assert "no result row to report" in mistake(run("report", "empty", "--out", "page"))


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_is_not_installed_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    lines_only(tmp_path / "results" / "a.json")
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == missing:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    line = mistake(run("report", "results", "--out", "page"))
    assert line == f"error: a report needs {missing}: pip install 'cskv[plots]'"

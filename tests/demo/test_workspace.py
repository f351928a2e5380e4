from __future__ import annotations

import pytest
from demo.workspace import Workspace

from cskv.errors import CSKVError

FACTS = {"model": "abc", "settings": {"cases": 2}}


def test_the_same_run_goes_on(tmp_path):
    Workspace(tmp_path, FACTS).write("rows/a.json", {"x": 1})
    again = Workspace(tmp_path, FACTS)
    assert again.resumed
    assert again.row("a") == {"x": 1}
    assert again.row("b") is None


def test_another_run_begins_anew_and_spares_files_that_are_not_the_demos(tmp_path):
    first = Workspace(tmp_path, FACTS)
    first.write("rows/a.json", {"x": 1})
    first.write("adapters/a/config.json", {})
    (tmp_path / "notes.txt").write_text("mine")
    other = Workspace(tmp_path, {**FACTS, "model": "other"})
    assert not other.resumed
    assert other.row("a") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.json"]


def test_a_completed_run_begins_anew(tmp_path):
    first = Workspace(tmp_path, FACTS)
    first.write("rows/a.json", {"x": 1})
    first.write("results.json", {"rows": []})
    again = Workspace(tmp_path, FACTS)
    assert not again.resumed
    assert again.row("a") is None
    assert not (tmp_path / "results.json").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CSKVError, match="cannot"):
        Workspace(tmp_path / "file" / "folder", FACTS)

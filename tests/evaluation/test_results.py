from __future__ import annotations

import json

import pytest

from cskv.errors import DataError
from cskv.evaluation.results import open_run, read_run

KEY = {"method": "PCA", "budget": 0.2, "task": "lines", "size": 200, "protocol": "in-prefill", "seed": 0}
MODEL = {"name": "tiny", "fingerprint": "ab"}


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    run = open_run(tmp_path / "run.json", {"cases": 4}, MODEL, {"cpu": "x"})
    run.methods["PCA"] = {"kind": "adapter"}
    run.add({**KEY, "n": 4, "score": 0.5})
    back = read_run(tmp_path / "run.json")
    assert (back.settings, back.model, back.environment) == ({"cases": 4}, MODEL, {"cpu": "x"})
    assert back.rows == run.rows
    assert back.methods == run.methods
    assert back.has(**KEY)
    assert not back.has(**{**KEY, "seed": 1})


def test_an_interrupted_run_goes_on_and_another_is_never_overwritten(tmp_path):
    path = tmp_path / "run.json"
    open_run(path, {"cases": 4, "sizes": (1, 2)}, MODEL, {"date": "1"}).add(KEY)
    again = open_run(path, {"cases": 4, "sizes": (1, 2)}, MODEL, {"date": "2"})
    assert again.rows == [KEY]
    assert again.environment == {"date": "2"}
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"other settings \(cases\); results are never overwritten"):
        open_run(path, {"cases": 5, "sizes": (1, 2)}, MODEL, {})
    with pytest.raises(DataError, match=r"other settings \(fingerprint\)"):
        open_run(path, {"cases": 4, "sizes": (1, 2)}, {**MODEL, "fingerprint": "cd"}, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot read the results"),
        ("[]", "is no result file"),
        ('{"format": "other"}', "is no result file"),
        ('{"format": "cskv-evaluation", "version": 99}', "is of version 99"),
        ('{"format": "cskv-evaluation", "version": 1}', "no whole result file: 'settings' is missing"),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path, content, complaint):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        read_run(path)


def test_rows_without_their_key_are_refused(tmp_path):
    run = open_run(tmp_path / "run.json", {}, MODEL, {})
    run.add({"method": "PCA"})
    with pytest.raises(DataError, match="lack budget, protocol, seed, size, task"):
        read_run(run.path)
    assert json.loads(run.path.read_text())["version"] == 1

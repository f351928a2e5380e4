from __future__ import annotations

import json

import pytest

from cskv.errors import DataError
from cskv.evaluation.results import Run
from cskv.evaluation.spectra import write_csv
from cskv.report.sources import gather, newest_rows
from tests.plots.made_up import MODEL
from tests.plots.support import decay
from tests.report.support import small_run

KEY = {"method": "PCA", "budget": 0.2, "task": "lines", "size": 200, "protocol": "in-prefill"}


def saved(path, date, rows, settings=None, **model):
    run = Run(path, settings or {}, MODEL | model, {"date": date} if date else {}, {}, rows)
    run.save()
    return run


def row(seed, score):
    return KEY | {"seed": seed, "n": 2, "score": score}


def test_a_folder_gives_its_results_and_spectra_and_names_the_rest(tmp_path):
    small_run(tmp_path / "a.json")
    (tmp_path / "settings.json").write_text('{"format": "other"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deeper").mkdir()
    small_run(tmp_path / "deeper" / "b.json")
    spectra = decay(2, ("weight",))
    write_csv(spectra, tmp_path / "spectra.csv")
    found = gather([tmp_path, tmp_path / "a.json", tmp_path / "spectra.csv"])  # both a second time
    assert [run.path.name for run in found.runs] == ["a.json"]
    assert [path.name for path in found.passed_over] == ["broken.json", "settings.json"]
    assert len(found.spectra) == len(spectra)


def test_a_file_that_is_named_must_hold_results(tmp_path):
    with pytest.raises(DataError, match="cannot read the results"):
        gather([tmp_path / "absent.json"])
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(DataError, match="is no result file"):
        gather([tmp_path / "settings.json"])


def test_nothing_to_report_is_refused(tmp_path):
    for paths in ([], [tmp_path]):
        with pytest.raises(DataError, match="no result row to report"):
            gather(paths)
    saved(tmp_path / "empty.json", None, [])
    with pytest.raises(DataError, match="no result row to report"):
        gather([tmp_path])


def test_two_tables_of_spectra_are_refused(tmp_path):
    small_run(tmp_path / "a.json")
    tables = [write_csv(decay(1, ("weight",)), tmp_path / name) for name in ("one.csv", "two.csv")]
    with pytest.raises(DataError, match="give one file"):
        gather([tmp_path, *tables])


def test_different_models_do_not_mix(tmp_path):
    saved(tmp_path / "a.json", "2026-01-01", [row(0, 1.0)], name="one", fingerprint="aa")
    saved(tmp_path / "b.json", "2026-01-01", [row(1, 1.0)], name="one", fingerprint="bb")
    with pytest.raises(DataError, match="a.json of one .fingerprint aa., .*b.json of one .fingerprint bb.") as caught:
        gather([tmp_path])
    assert "\n" not in str(caught.value)


def test_the_same_model_from_two_places_is_one_model(tmp_path):
    saved(tmp_path / "a.json", "2026-01-01", [row(0, 1.0)], name="here/model")
    saved(tmp_path / "b.json", "2026-01-02", [row(1, 1.0)], name="there/model")
    assert len(gather([tmp_path]).runs) == 2


def test_runs_without_fingerprints_are_told_apart_by_name(tmp_path):
    saved(tmp_path / "a.json", "2026-01-01", [row(0, 1.0)], name="one", fingerprint=None)
    saved(tmp_path / "b.json", "2026-01-02", [row(1, 1.0)], name="two", fingerprint=None)
    with pytest.raises(DataError, match="different models"):
        gather([tmp_path])


def test_a_damaged_head_is_refused(tmp_path):
    run = saved(tmp_path / "a.json", None, [row(0, 1.0)])
    content = json.loads(run.path.read_text()) | {"environment": ["x"]}
    run.path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="environment of .* no object"):
        gather([tmp_path])


def test_the_newest_row_of_a_key_counts(tmp_path):
    saved(tmp_path / "new.json", "2026-03-01T00:00:00+00:00", [row(0, 0.5), row(2, 1.0)], {"cases": 4})
    saved(tmp_path / "old.json", "2026-02-28T23:00:00", [row(0, 1.0), row(1, 1.0)], {"cases": 2, "window": 1})
    saved(tmp_path / "undated.json", None, [row(1, 0.0)], {"cases": 2})
    rows, replaced = newest_rows(gather([tmp_path]).runs)
    assert {entry["seed"]: entry["score"] for entry in rows} == {0: 0.5, 1: 1.0, 2: 1.0}
    named = {(r.older.path.name, r.newer.path.name): (r.count, r.settings) for r in replaced}
    assert named == {
        ("undated.json", "old.json"): (1, ["window"]),
        ("old.json", "new.json"): (1, ["cases", "window"]),
    }

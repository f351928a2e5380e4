"""Statistics as a file, and which model they belong to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cskv.adapter.base_model import BaseModelInfo
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.errors import AdapterError, CSKVError, DataError
from cskv.models.survey import survey
from tests.calibration.test_calibrate import SHORT, random_samples, tiny
from tests.disk import disk_full


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    model = tiny()
    statistics = calibrate(model, random_samples(), SHORT, covariance=True, source="a text", seed=7)
    path = tmp_path / "new" / "statistics.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert (loaded.base, loaded.tokens, loaded.source, loaded.seed) == (statistics.base, 60, "a text", 7)
    assert list(loaded.layers) == [0, 1, 2]
    assert loaded.has_covariance
    for i, layer in statistics.layers.items():
        assert loaded.layers[i].keys() == layer.keys()
        assert all(torch.equal(loaded.get(i, name), tensor) for name, tensor in layer.items())
    loaded.check_fits(survey(model))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "num_layers 3, this model has 2"),
        ({"hidden_size": 32}, "hidden_size 16, this model has 32"),
    ],
)
def test_statistics_of_another_model_are_refused(changes: dict[str, int], message: str) -> None:
    other = tiny(**changes)
    statistics = calibrate(tiny(), random_samples(), SHORT)
    with pytest.raises(AdapterError, match=message):
        statistics.check_fits(survey(other))


def test_moments_of_another_kv_dim_are_refused() -> None:
    statistics = calibrate(tiny(), random_samples(), SHORT, covariance=True)
    other = tiny(num_key_value_heads=4)
    with pytest.raises(AdapterError, match=r"of layer 0 has 8 channels, this model has 16"):
        statistics.check_fits(survey(other))


def test_statistics_of_other_weights_are_refused() -> None:
    statistics, other = calibrate(tiny(), random_samples(), SHORT), tiny()
    other.model.layers[1].self_attn.v_proj.weight.data.mul_(-1)
    with pytest.raises(AdapterError, match=r"key and value weights differ by .*; calibrate this model"):
        statistics.check_fits(survey(other))
    statistics.check_fits(survey(tiny().bfloat16()))


def test_statistics_of_an_older_version_say_that_they_do_not_know_their_weights(tmp_path: Path) -> None:
    statistics = calibrate(tiny(), random_samples(), SHORT)
    older = dataclasses.replace(statistics, base=BaseModelInfo.from_model(tiny()))
    older.save(tmp_path / "s.safetensors")
    with pytest.warns(UserWarning, match="by an older cskv: whether from the weights of this model is not known"):
        Statistics.load(tmp_path / "s.safetensors").check_fits(survey(tiny()))


def test_a_full_disk_leaves_the_former_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics, path = calibrate(tiny(), random_samples(), SHORT), tmp_path / "s.safetensors"
    statistics.save(path)
    before = path.read_bytes()
    disk_full(monkeypatch, path.name)
    with pytest.raises(CSKVError, match="No space left on device.*free some space there") as caught:
        dataclasses.replace(statistics, tokens=7).save(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(DataError, match="there are no calibration statistics"):
        Statistics.load(path)
    statistics = calibrate(tiny(), random_samples(), SHORT)
    statistics.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="truncated or no safetensors"):
        Statistics.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="holds no calibration statistics"):
        Statistics.load(path)


def test_a_file_with_nan_is_refused(tmp_path: Path) -> None:
    statistics = calibrate(tiny(), random_samples(), SHORT)
    broken = {i: dict(layer) for i, layer in statistics.layers.items()}
    broken[2]["input.mean_abs"] = torch.full((16,), math.nan)
    Statistics(broken, statistics.base, 60).save(tmp_path / "s.safetensors")
    assert load_file(tmp_path / "s.safetensors")["layers.2.input.mean_abs"].isnan().all()
    with pytest.raises(DataError, match="layer 2 holds NaN"):
        Statistics.load(tmp_path / "s.safetensors")


def test_a_statistic_that_was_not_collected_says_how_to_get_it() -> None:
    with pytest.raises(DataError, match=r"lack k\.moment of layer 0; calibrate again with covariance"):
        calibrate(tiny(), random_samples(), SHORT, covariance=False).get(0, "k.moment")

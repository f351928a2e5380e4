from __future__ import annotations

import csv
import math

import pytest
import torch

from cskv.calibration.calibrate import calibrate
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, DataError
from cskv.evaluation.spectra import (
    COLUMNS,
    Spectrum,
    calibrated_spectra,
    moment_spectrum,
    read_csv,
    summary_rows,
    weight_spectra,
    write_csv,
)
from tests.evaluation.support import tiny_llama


def spectrum(*values: float) -> Spectrum:
    return Spectrum(0, "k", "weight", values)


def test_normalised_values_and_energy_by_hand():
    made = spectrum(4.0, 2.0, 2.0, 1.0)  # squares 16, 4, 4, 1: sum 25
    assert made.normalised == (1.0, 0.5, 0.5, 0.25)
    assert made.cumulative_energy == pytest.approx((0.64, 0.8, 0.96, 1.0))
    assert [made.rank_for(share) for share in (0.5, 0.64, 0.65, 0.8, 0.95, 0.97, 1.0)] == [1, 1, 2, 2, 3, 4, 4]


def test_equal_values_need_their_share_of_ranks():
    assert [spectrum(*[3.0] * 10).rank_for(share) for share in (0.1, 0.9, 0.95, 1.0)] == [1, 9, 10, 10]


def test_a_matrix_of_zeros_needs_one_rank_and_divides_by_nothing():
    made = spectrum(0.0, 0.0)
    assert made.normalised == (0.0, 0.0)
    assert made.rank_for(0.99) == 1


def test_a_low_rank_weight_is_found_out():
    model = tiny_llama()
    site = model.model.layers[1].self_attn
    left = torch.linalg.qr(torch.randn(16, 16))[0][:, :3]
    right = torch.linalg.qr(torch.randn(32, 32))[0][:, :3]
    site.k_proj.weight.data = left @ torch.diag(torch.tensor([5.0, 3.0, 1.0])) @ right.T
    spectra = {(s.layer, s.projection): s for s in weight_spectra(model)}
    assert list(spectra) == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    assert spectra[1, "k"].values[:3] == pytest.approx((5.0, 3.0, 1.0), rel=1e-5)
    assert spectra[1, "k"].values[3] < 1e-5
    assert spectra[1, "k"].rank_for(0.999) == 3
    assert spectra[1, "v"].rank_for(0.999) > 12


def test_a_moment_gives_the_singular_values_of_the_scaled_data():
    keys = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = moment_spectrum(keys.T @ keys / 50, layer=4, projection="v")
    assert made.values == pytest.approx((torch.linalg.svdvals(keys) / math.sqrt(50)).tolist())
    assert (made.layer, made.projection, made.source) == (4, "v", "calibrated")


def test_a_singular_moment_has_no_negative_values():
    vector = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    made = moment_spectrum(vector @ vector.T, 0, "k")
    assert made.values[0] == pytest.approx(math.sqrt(14))
    assert all(0 <= value < 1e-6 for value in made.values[1:])


def test_a_moment_with_nan_is_refused():
    with pytest.raises(DataError, match="layer 2 k is not finite"):
        moment_spectrum(torch.full((3, 3), math.nan), 2, "k")


def test_calibrated_spectra_are_those_of_all_keys_and_values():
    model = tiny_llama()
    samples = [torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    outputs = []
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _a, out: outputs.append(out[0]))
    statistics = calibrate(model, samples, CSKVConfig(sinks=0), fisher=False)
    hook.remove()
    spectra = {(s.layer, s.projection): s for s in calibrated_spectra(model, statistics)}
    assert list(spectra) == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    seen = outputs[-len(samples) :]  # what ran before them is the probe of the model
    expected = torch.linalg.svdvals(torch.cat(seen).double()) / math.sqrt(60)
    assert spectra[1, "v"].values == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_statistics_without_moments_or_of_another_model_are_refused():
    model, samples = tiny_llama(), [torch.arange(8)]
    with pytest.raises(DataError, match="with covariance"):
        calibrated_spectra(model, calibrate(model, samples, covariance=False))
    with pytest.raises(AdapterError, match="num_layers"):
        calibrated_spectra(tiny_llama(layers=1), calibrate(model, samples, CSKVConfig(sinks=0), fisher=False))


def test_summary_and_csv(tmp_path):
    spectra = [spectrum(4.0, 2.0, 2.0, 1.0), Spectrum(3, "v", "calibrated", (1.0, 0.0))]
    assert summary_rows(spectra)[0] == {
        "layer": 0,
        "projection": "k",
        "source": "weight",
        "values": 4,
        "rank_90": 3,
        "rank_95": 3,
        "rank_99": 4,
    }
    with write_csv(spectra, tmp_path / "new" / "spectra.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[1] == {
        "layer": "0",
        "projection": "k",
        "source": "weight",
        "index": "2",
        "value": "2",
        "normalised": "0.5",
        "cumulative_energy": "0.8",
    }
    assert rows[4]["source"] == "calibrated"


def test_a_table_of_spectra_is_read_back(tmp_path):
    spectra = [Spectrum(0, "k", "weight", (3.0, 1.5, 0.0)), Spectrum(1, "v", "calibrated", (0.1,))]
    assert read_csv(write_csv(spectra, tmp_path / "s.csv")) == spectra


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no spectra; expected the columns layer, projection"),
        ("a,b\n1,2\n", "holds no spectra"),
        ("{header}\n", "holds no spectra"),
        ("{header}\n0,k,weight,1,x,1,1\n", "line 2 of .* holds no singular value"),
        ("{header}\n0,k,weight,1,nan,1,1\n", "line 2 of .* k, weight, nan"),
        ("{header}\n0,q,weight,1,1,1,1\n", "line 2 of .* q, weight, 1"),
        ("{header}\n0,k\n", "line 2 of .* holds no singular value"),
    ],
)
def test_what_is_no_table_of_spectra_is_refused(tmp_path, content, complaint):
    path = tmp_path / "s.csv"
    path.write_text(content.replace("{header}", ",".join(COLUMNS)))
    with pytest.raises(DataError, match=complaint):
        read_csv(path)


def test_a_missing_table_of_spectra_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read the spectra"):
        read_csv(tmp_path / "absent.csv")

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake

pytest.importorskip("matplotlib")


def test_weights_only_gives_torch_s_singular_values(run: Run, model_folder: Path) -> None:
    report = last_json(run("analyze", "--model-path", model_folder, "--weights-only"))
    assert report["csv"] == "outputs/analysis/tiny/spectra.csv"
    assert Path(report["png"]).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(Path(report["csv"]).read_text(encoding="utf-8").splitlines()))
    weight = AutoModelForCausalLM.from_pretrained(model_folder).model.layers[1].self_attn.v_proj.weight
    found = [float(row["value"]) for row in rows if (row["layer"], row["projection"]) == ("1", "v")]
    assert found == pytest.approx(torch.linalg.svdvals(weight.double()).tolist(), rel=1e-5)
    assert {row["source"] for row in rows} == {"weight"}
    assert [row["values"] for row in report["spectra"]] == [16] * 4


def test_saved_statistics_and_a_calibration_on_the_spot_agree(run: Run, model_folder: Path, text_file: Path) -> None:
    options = ["--model-path", model_folder, "--dataset", text_file, "--num-samples", 4, "--max-seq-len", 32]
    statistics = last_json(run("calibrate", *options, "--no-fisher"))["statistics"]
    saved = last_json(run("analyze", "-m", model_folder, "--statistics", statistics, "--output", "a"))
    fresh = last_json(run("analyze", *options, "--output", "b"))
    assert {row["source"] for row in saved["spectra"]} == {"weight", "calibrated"}
    assert Path("a/spectra.csv").read_text() == Path("b/spectra.csv").read_text()
    assert saved["spectra"] == fresh["spectra"]


def test_statistics_without_second_moments(run: Run, model_folder: Path, text_file: Path) -> None:
    options = ["--model-path", model_folder, "--dataset", text_file, "--num-samples", 4, "--max-seq-len", 32]
    statistics = last_json(run("calibrate", *options, "--no-covariance"))["statistics"]
    line = mistake(run("analyze", "--model-path", model_folder, "--statistics", statistics))
    assert "moment" in line
    assert "covariance" in line

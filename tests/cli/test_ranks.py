"""Ranks from one budget on the command line, and the figures that show them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake

pytest.importorskip("matplotlib")


@pytest.fixture
def options(model_folder: Path, text_file: Path) -> list[object]:
    return ["--model-path", model_folder, "--dataset", text_file, "--num-samples", 4, "--max-seq-len", 64]


def test_one_budget_is_dealt_out_saved_and_drawn(run: Run, options: list[object]) -> None:
    last_json(run("calibrate", *options))
    made = ["--init", "pca", "--target-ratio", 0.25, "--use-init-params", "--use-window"]
    report = last_json(run("train", *options, *made))
    assert report["adapter"].endswith("k0.25-v0.25-pca-window0-group32-allocated-untrained")
    description = json.loads(Path(report["adapter"], "config.json").read_text())
    ranks = description["ranks"]
    assert sum(layer["k"] + layer["v"] for layer in ranks.values()) == 0.25 * 2 * 2 * 16
    assert min(report["uniform_kl"], report["allocated_kl"]) >= 0
    drawn = last_json(run("analyze", *options, "--adapter", report["adapter"]))
    ranks_png, losses_png, losses_csv = map(Path, drawn["adapter_files"])
    assert ranks_png.read_bytes().startswith(b"\x89PNG")
    assert losses_png.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(losses_csv.read_text().splitlines()))
    assert {row["method"] for row in rows} == {"this adapter", "SVD", "ASVD", "PCA"}
    loss = {(row["method"], row["layer"]): float(row["k_loss"]) + float(row["v_loss"]) for row in rows}
    for layer in ("0", "1"):
        assert loss["this adapter", layer] == pytest.approx(loss["PCA", layer], rel=1e-3)
        assert loss["PCA", layer] <= min(loss["SVD", layer], loss["ASVD", layer]) * (1 + 1e-6)


def test_a_budget_needs_pca_and_room(run: Run, options: list[object]) -> None:
    last_json(run("calibrate", *options))
    few = ["--use-init-params", "--use-window", "--target-ratio"]
    assert "init is 'svd'; expected 'pca'" in mistake(run("train", *options, "--init", "svd", *few, 0.25))
    assert "k_density is 1.5" in mistake(run("train", *options, "--init", "pca", *few, 1.5))

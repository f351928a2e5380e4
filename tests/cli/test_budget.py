"""Ranks and widths from one budget on the command line, and the figures that show them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cskv.adapter.adapter import CSKVAdapter
from cskv.compression.budget import ratio_of
from tests.cli.conftest import Run
from tests.cli.support import TEXT, last_json, mistake

WINDOW = ["--window", 8, "--group", 4]
WHOLE = 2 * 2 * 16 * 2  # bytes of a token: layers, keys and values, channels


@pytest.fixture
def options(model_folder: Path, text_file: Path) -> list[object]:
    return ["--model-path", model_folder, "--dataset", text_file, "--num-samples", 4, "--max-seq-len", 64]


@pytest.fixture
def calibrated(run: Run, options: list[object]) -> list[object]:
    last_json(run("calibrate", *options, *WINDOW))
    return [*options, *WINDOW]


@pytest.mark.parametrize(
    ("budget", "kept", "name"),
    [
        (["--target-ratio", 0.2], {"ratio": 0.2}, "ratio0.2"),
        (["--bytes-per-token", 32], {"bytes_per_token": 32.0}, "bytes32"),
        (["--max-kl", 0.01], {"max_kl": 0.01}, "kl0.01"),
    ],
)
@pytest.mark.parametrize("ranks_only", [False, True])
def test_three_forms_of_a_budget(
    run: Run, calibrated: list[object], budget: list[object], kept: dict, name: str, ranks_only: bool
) -> None:
    given = [*budget, *["--ranks-only"] * ranks_only, "--use-init-params"]
    result = run("train", *calibrated, *given)
    report = last_json(result)
    ending = "-ranks-untrained" if ranks_only else "-untrained"
    assert report["adapter"] == f"outputs/adapters/tiny/{name}-fisher-pca-window8-group4-sinks4{ending}"
    adapter = CSKVAdapter.from_pretrained(report["adapter"])
    assert report["settings"] == adapter.config.to_dict()
    assert adapter.config.mixed_widths == (not ranks_only)
    described = json.loads(Path(report["adapter"], "config.json").read_text())
    inspected = run("inspect", report["adapter"])
    for metrics in (report, described["metrics"], last_json(inspected)["metrics"]):
        assert metrics["ratio"] == ratio_of(adapter)
        assert metrics["budget"] == kept
        assert metrics["predicted_kl"] != metrics["measured_kl"]
    assert f"predicted_kl {report['predicted_kl']:.6g}" in inspected.stdout
    if "max_kl" in kept:
        assert report["predicted_kl"] <= 0.01
        assert report["ratio"] < 0.9
    else:
        assert ratio_of(adapter) * WHOLE <= kept.get("bytes_per_token", 0.2 * WHOLE)
    assert f"{report['ratio']:.2%} of the bytes; KL to the uncompressed model" in result.stderr
    assert f"measured on text kept aside {report['measured_kl']:.4g}" in result.stderr


def test_from_a_budget_through_training_to_generation(run: Run, calibrated: list[object]) -> None:
    report = last_json(run("train", *calibrated, "--target-ratio", 0.2, "--learning-rate", 1e-4))
    assert report["steps"] == 4
    assert {"predicted_kl", "measured_kl", "loss"} <= set(report)
    adapter = CSKVAdapter.from_pretrained(report["adapter"])
    inspected = last_json(run("inspect", report["adapter"]))
    assert inspected["settings"]["mixed_widths"] is True
    for index, kinds in inspected["widths"].items():
        for kind, runs in kinds.items():
            assert sum(channels for _, channels in runs) == inspected["ranks"][index][kind]
    sinks = adapter.config.sinks
    prompt = TEXT[: 200 + sinks]
    generated = last_json(run("generate", "--adapter", report["adapter"], "--prompt", prompt, "-n", 12))
    cache = generated["cache"]
    held = cache["payload_bytes"] + cache["scale_bytes"] + cache["minimum_bytes"]
    assert held == pytest.approx(ratio_of(adapter) * 200 * WHOLE)


def test_ranks_of_a_budget_are_drawn(run: Run, calibrated: list[object]) -> None:
    report = last_json(run("train", *calibrated, "--target-ratio", 0.25, "--ranks-only", "--use-init-params"))
    ranks = json.loads(Path(report["adapter"], "config.json").read_text())["ranks"]
    assert sum(layer["k"] + layer["v"] for layer in ranks.values()) == 0.25 * 2 * 2 * 16
    drawn = last_json(run("analyze", *calibrated[:-4], "--adapter", report["adapter"]))
    ranks_png, losses_png, losses_csv = map(Path, drawn["adapter_files"])
    assert ranks_png.read_bytes().startswith(b"\x89PNG")
    assert losses_png.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(losses_csv.read_text().splitlines()))
    assert {row["method"] for row in rows} == {"this adapter", "SVD", "ASVD", "PCA"}
    loss = {(row["method"], row["layer"]): float(row["k_loss"]) + float(row["v_loss"]) for row in rows}
    for layer in ("0", "1"):
        assert loss["PCA", layer] <= min(loss[name, layer] for name in ("SVD", "ASVD", "this adapter")) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--target-ratio", 0.2, "--max-kl", 0.1], "--target-ratio and --max-kl are one budget in two forms"),
        (["--bytes-per-token", 9, "--max-kl", 0.1], "--bytes-per-token and --max-kl are one budget in two forms"),
        (["--ranks-only"], "--ranks-only goes with a budget; give --target-ratio, --bytes-per-token or --max-kl"),
        (["--target-ratio", 1.5], "ratio is 1.5; expected a share of the uncompressed bytes in (0, 1]"),
        (["--target-ratio", 0], "ratio is 0.0"),
        (["--bytes-per-token", -4], "bytes_per_token is -4.0; expected a number above 0"),
        (["--max-kl", 0], "max_kl is 0.0; expected a number above 0"),
        (["--max-kl", "nan"], "--max-kl is nan"),
        (["--target-ratio", 0.001], "no choice of widths takes 0.001 of the bytes; raise the budget"),
        (["--target-ratio", 0.2, "--init", "svd"], "init is 'svd'; expected 'fisher-pca'"),
        (["--target-ratio", 0.2, "--init", "weighted-pca"], "init is 'weighted-pca'; expected 'fisher-pca'"),
        (["--target-ratio", 0.2, "--use-asvd"], "init is 'asvd'; expected 'fisher-pca'"),
        (["--target-ratio", 0.2, "--k-bits", 4], "a budget chooses the widths of latents; got k_bits 4"),
        (
            ["--target-ratio", 0.2, "--max-seq-len", 12],
            "a sample of 12 tokens has none that would be read",
        ),
        (["--target-ratio", 0.2, "--num-samples", 1], "at least 2 samples, got 1"),
        (["--from-adapter", "nowhere", "--target-ratio", 0.2], "give it without --target-ratio"),
        (["--from-adapter", "nowhere", "--max-kl", 0.2], "give it without --max-kl"),
        (["--from-adapter", "nowhere", "--ranks-only"], "--ranks-only goes with a budget"),
        (["--mixed-widths", "--target-ratio", 0.2], "--mixed-widths"),
    ],
)
def test_mistakes_are_one_line(run: Run, calibrated: list[object], wrong: list[object], says: str) -> None:
    assert says in mistake(run("train", *calibrated, *wrong, "--use-init-params"))
    assert not list(Path("outputs").rglob("config.json"))


def test_a_budget_needs_statistics_with_fisher_information(run: Run, options: list[object]) -> None:
    given = ["--target-ratio", 0.2, "--use-init-params"]
    assert "make them with `cskv calibrate`" in mistake(run("train", *options, *WINDOW, *given))
    last_json(run("calibrate", *options, *WINDOW, "--no-fisher"))
    line = mistake(run("train", *options, *WINDOW, *given))
    assert "calibrate again with Fisher information" in line

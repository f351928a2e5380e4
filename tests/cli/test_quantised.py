"""Packed latents on the command line: widths and blocks as options, and what is printed of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cskv.adapter.adapter import CSKVAdapter
from tests.cli.conftest import Run
from tests.cli.support import TEXT, last_json, mistake

DATA = ["--num-samples", 6, "--max-seq-len", 64]
WINDOW = ["--window", 8, "--group", 4, "--sinks", 0]


@pytest.fixture
def options(model_folder: Path, text_file: Path) -> list[object]:
    return ["--model-path", model_folder, "--dataset", text_file, *DATA]


def test_bits_and_blocks_are_named_and_their_bytes_printed(run: Run, options: list[object]) -> None:
    quantised = [
        "--init",
        "svd",
        "--k-bits",
        4,
        "--v-bits",
        4,
        "--k-block",
        "4x2",
        "--k-density",
        0.5,
        "--v-density",
        0.25,
    ]
    report = last_json(run("train", *options, *WINDOW, *quantised))
    assert report["adapter"] == "outputs/adapters/tiny/k0.5-v0.25-svd-window8-group4-k4bits-4x2-v4bits-1x32"
    assert (report["settings"]["k_bits"], report["settings"]["k_block"]) == (4, [4, 2])
    result = run("inspect", report["adapter"], "--tokens", 1008)
    inspected = last_json(result)
    sealed, layers = 1000, 2
    k_bits, v_bits = 4 + 32 / (4 * 2), 4 + 32 / 4  # a minimum and a scale for 8 key latents, and for the 4 of a value
    assert inspected["bits_per_latent"] == {"0": [k_bits, v_bits], "1": [k_bits, v_bits]}
    cache = inspected["cache"]
    assert cache["payload_bytes"] == sealed * layers * (8 + 4) // 2
    assert cache["scale_bytes"] == cache["minimum_bytes"] == layers * 2 * (sealed // 4 * 4 + sealed)
    assert inspected["widths"] is None
    printed = result.stdout
    assert f"scales {cache['scale_bytes']:,}, minima {cache['minimum_bytes']:,}, exact tokens" in printed
    assert f"{cache['ratio']:.1%} of it" in printed
    table = printed.splitlines()[printed.splitlines().index("") + 1 :]
    assert table[0].split("    ")[-2:] == ["K bits", "V bits"]
    assert table[1].split()[-2:] == ["8.00", "12.00"]
    generated = last_json(run("generate", "--adapter", report["adapter"], "--prompt", TEXT[:200], "-n", 12))
    assert generated["cache"]["payload_bytes"] == (211 - 8) // 4 * 4 * layers * (8 + 4) // 2
    assert generated["cache"]["minimum_bytes"] == 200 // 4 * layers * 2 * (4 + 4)


def test_a_trained_adapter_is_put_in_few_bits(run: Run, options: list[object]) -> None:
    """Its own densities, init and window stay; untrained it is post-training quantisation, trained it goes on."""
    made = [*WINDOW, "--init", "svd", "--k-density", 0.5, "--v-density", 0.25, "--learning-rate", 1e-2]
    trained = last_json(run("train", *options, *made))["adapter"]
    few = ["--from-adapter", trained, "--k-bits", 4, "--v-bits", 2]
    result = run("train", *options, *few, "--use-init-params")
    assert "latents are not centred" in result.stderr
    report = last_json(result)
    assert report["adapter"] == "outputs/adapters/tiny/k0.5-v0.25-svd-window8-group4-k4bits-4x1-v2bits-1x32-untrained"
    last_json(run("calibrate", *options, *WINDOW))
    again = last_json(run("train", *options, *few, "--window", 0, "--group", 8, "--learning-rate", 1e-3))
    assert again["adapter"] == "outputs/adapters/tiny/k0.5-v0.25-svd-window0-group8-k4bits-8x1-v2bits-1x32"
    assert again["loss"] < again["initial_loss"] * 1.2
    assert CSKVAdapter.from_pretrained(again["adapter"]).factors(0).k.rank == 8
    assert "adapter of 16-bit latents" in mistake(run("train", *options, "--from-adapter", again["adapter"]))


def test_latents_of_16_bits_have_no_scales_to_print(run: Run, options: list[object]) -> None:
    report = last_json(run("train", *options, *WINDOW, "--init", "svd", "--use-init-params"))
    result = run("inspect", report["adapter"])
    assert last_json(result)["bits_per_latent"]["0"] == [16.0, 16.0]
    assert "scales" not in result.stdout
    assert "minima" not in result.stdout


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--from-adapter", "nowhere"], "no adapter folder 'nowhere' here"),
        (["--k-block", "4"], "--k-block is '4'; expected TOKENSxCHANNELS, for instance 32x4"),
        (["--k-block", "4x"], "--k-block is '4x'"),
        (["--k-block", "axb"], "--k-block is 'axb'"),
        (["--k-block", "4x2x1"], "--k-block is '4x2x1'"),
        (["--v-block", "-4x2"], "--v-block is '-4x2'"),
        (["--v-block", "4*2"], "--v-block is '4*2'"),
        (["--v-block", "0x2"], "v_block is (0, 2); expected two whole numbers (tokens, channels), at least 1"),
        (["--k-block", "3x2"], "k_block has 3 tokens, which do not divide the group of 4"),
        (["--k-bits", 1], "k_bits is 1; expected 2 to 8, or 16"),
    ],
)
def test_mistakes_are_one_line(run: Run, options: list[object], wrong: list[object], says: str) -> None:
    assert says in mistake(run("train", *options, *WINDOW, *wrong))
    assert not list(Path("outputs").rglob("config.json"))

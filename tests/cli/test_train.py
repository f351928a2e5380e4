from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake, save_llama

QUICK = ["--init", "svd", "--num-samples", 6, "--max-seq-len", 32, "--learning-rate", 1e-2, "--window", 8, "--group", 4]


def test_training_lowers_the_loss_and_writes_a_whole_adapter(run: Run, model_folder: Path, text_file: Path) -> None:
    report = last_json(run("train", "-m", model_folder, "--dataset", text_file, *QUICK, "--epochs", 4))
    assert report["steps"] == 24
    assert report["tokens"] == 24 * 32
    assert report["k_loss"] < report["initial_k_loss"]
    assert report["v_loss"] < report["initial_v_loss"]
    folder = Path(report["adapter"])
    assert folder == Path("outputs/adapters/tiny/k0.2-v0.2-svd-window8-group4-sinks4")
    inspected = last_json(run("inspect", folder))
    assert inspected["settings"] == report["settings"]
    assert inspected["metrics"]["k_loss"] == report["k_loss"]
    assert inspected["ranks"]["0"] == {"k": 3, "v": 3, "kv_dim": 16}
    cache = inspected["cache"]
    assert cache["tokens"] == 16384
    assert cache["payload_bytes"] == (16384 - 4 - 8) // 4 * 4 * 2 * (3 + 3) * 2  # sealed tokens, layers, ranks, bytes
    assert cache["uncompressed_bytes"] == 16384 * 2 * 32 * 2
    assert inspected["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_distillation_reports_one_loss(run: Run, model_folder: Path, text_file: Path) -> None:
    options = ["-m", model_folder, "--dataset", text_file, *QUICK, "--objective", "distillation", "--epochs", 3]
    report = last_json(run("train", *options))
    assert report["loss"] < report["initial_loss"]
    assert "k_loss" not in report
    assert report["objective"] == "distillation"


def test_the_papers_commands_with_its_flags(run: Run, model_folder: Path, text_file: Path) -> None:
    model = ["--model_path", model_folder, "--model_id", "my-name"]
    data = ["--training_dataset", text_file, "--max_seq_len", 32, "--num_samples", 5]
    compression = ["--k_density", 0.5, "--v_density", 0.25, "--use_asvd", "--use_window", "--q_window_size", 16]
    compression += ["--k_bits", 16, "--v_bits", 16, "--asvd_calib_root", "stats"]
    calibrated = last_json(run("calibrate", *model, *data, "--cache_root_path", "stats", "--no-fisher"))
    assert calibrated["statistics"] == "stats/my-name/statistics.safetensors"
    assert calibrated["tokens"] == 5 * 32
    schedule = ["--epoches", 1, "--warmup_steps", 2, "--learning_rate", "5e-5", "--ckpt_save_path", "adapters"]
    trained = last_json(run("train", *model, *data, *compression, *schedule))
    assert trained["adapter"] == "adapters/my-name/k0.5-v0.25-asvd-window0-group16"
    assert trained["settings"]["window"] == 0
    assert trained["settings"]["group"] == 16
    assert trained["settings"]["init"] == "asvd"
    roots = ["--kv_ckpt_root_path", "adapters", "--attn_impl", "eager"]
    prompt = ["--prompt", "A cache of old tokens", "--max_new_tokens", 24]
    report = last_json(run("generate", *model, *compression, *roots, *prompt))
    assert report["compressed"] is True
    assert report["cache"]["payload_bytes"] == report["cache"]["tokens"] // 16 * 16 * 2 * (8 + 4) * 4
    untrained = last_json(run("generate", *model, *compression, *roots, *prompt, "--use_init_params"))
    assert untrained["compressed"] is True
    assert (
        last_json(run("generate", *model, *compression, *roots, *prompt, "--use_origin_model"))["compressed"] is False
    )


def test_without_use_window_every_token_is_compressed_at_once(run: Run, model_folder: Path) -> None:
    result = run("train", "--model_path", model_folder, "--use_init_params", "--no_use_asvd")
    report = last_json(result)
    assert (report["settings"]["window"], report["settings"]["group"]) == (0, 1)
    assert "no exact window" in result.stderr


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        (["--init", "fisher-pca"], ""),
        (["--init", "pca"], ""),
        (["--init", "weighted-pca", "--head-groups", 2], "-headgroups2"),
        (["--init", "pca", "--key_factors", "commuting"], "-commuting"),
    ],
)
def test_closed_form_adapters(run: Run, model_folder: Path, text_file: Path, options: list, suffix: str) -> None:
    text = ["--dataset", text_file, "--num-samples", 6, "--max-seq-len", 32]
    window = ["--window", 8, "--group", 4]
    last_json(run("calibrate", "-m", model_folder, *text, *window))
    compression = [*options, "--k-density", 0.5, "--v-density", 0.5, *window]
    made = last_json(run("train", "-m", model_folder, *compression, "--use-init-params"))
    name = f"k0.5-v0.5-{options[1]}-window8-group4-sinks4{suffix}-untrained"
    assert made["adapter"] == f"outputs/adapters/tiny/{name}"
    report = last_json(run("generate", "--adapter", made["adapter"], "--prompt", "A cache of old tokens", "-n", 24))
    assert report["cache"]["payload_bytes"] == (report["cache"]["tokens"] - 4 - 8) // 4 * 4 * 2 * (8 + 8) * 4


def test_pca_needs_second_moments(run: Run, model_folder: Path, text_file: Path) -> None:
    text = ["--dataset", text_file, "--num-samples", 6, "--max-seq-len", 32]
    last_json(run("calibrate", "-m", model_folder, *text, "--no-covariance"))
    line = mistake(run("train", "-m", model_folder, "--use-init-params", "--init", "pca"))
    assert "calibrate again" in line
    assert "covariance" in line


def test_untrained_adapters_do_not_replace_trained_ones(run: Run, model_folder: Path, text_file: Path) -> None:
    from cskv.adapter.adapter import CSKVAdapter

    options = ["-m", model_folder, *QUICK, "--dataset", text_file]
    trained = Path(last_json(run("train", *options))["adapter"])
    before = (trained / "model.safetensors").read_bytes()
    untrained = Path(last_json(run("train", *options, "--use-init-params"))["adapter"])
    assert untrained == trained.with_name(trained.name + "-untrained")
    assert (trained / "model.safetensors").read_bytes() == before
    assert CSKVAdapter.from_pretrained(untrained).metrics == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--k_density", "0"], "k_density is 0.0"),
        (["--v_density", "1.5"], "v_density is 1.5"),
        (["--k_density", "0.001", "--use-init-params", "--init", "svd"], "rounds to rank 0"),
        (["--v_bits", "12"], "v_bits is 12; expected 2 to 8, or 16"),
        (["--use_asvd", "--init", "pca"], "--use-asvd and --init pca contradict each other"),
        (["--no_use_asvd", "--init", "pca"], "--no-use-asvd and --init pca contradict each other"),
        (["--init", "magic"], "init is 'magic'"),
        (["--key-factors", "commuting", "--use-asvd"], "expected 'fisher-pca', 'weighted-pca' or 'pca'"),
        (["--use_asvd"], "make them with `cskv calibrate`"),
        ([], "make them with `cskv calibrate`"),
        (["--dataset", "absent.txt"], "absent.txt"),
        (["--num-samples", "0"], "got 0 samples"),
        (["--max-seq-len", "100000"], "one sample needs 100000"),
        (["--num-samples", "5000", "--init", "svd"], "5000 were asked for"),
        (["--learning-rate", "-1"], "learning_rate is -1.0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--schedule", "zigzag"], "schedule is 'zigzag'"),
        (["--objective", "glory"], "objective is 'glory'"),
    ],
)
def test_mistakes_are_one_line(run: Run, model_folder: Path, text_file: Path, options: list[str], says: str) -> None:
    defaults = ["--num-samples", 4, "--max-seq-len", 32, "--dataset", text_file]
    assert says in mistake(run("train", "--model-path", model_folder, *defaults, *options))


@pytest.mark.parametrize(("text", "says"), [("", "holds no text"), (" \n\n ", "one sample needs")])
def test_empty_text(run: Run, model_folder: Path, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "empty.txt").write_text(text, encoding="utf-8")
    for name in ("train", "calibrate"):
        assert says in mistake(run(name, "--model-path", model_folder, "--dataset", "empty.txt"))


def test_output_that_cannot_be_written(run: Run, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    options = ["--model-path", model_folder, "--dataset", text_file, "--num-samples", 4, "--max-seq-len", 32]
    assert "file" in mistake(run("train", *options, "--output", "file/adapter"))
    assert "file" in mistake(run("calibrate", *options, "--output", "file/statistics.safetensors"))
    assert "file" in mistake(run("analyze", "--model-path", model_folder, "--weights-only", "--output", "file/folder"))


def test_statistics_with_nan(run: Run, model_folder: Path, text_file: Path) -> None:
    options = ["--model-path", model_folder, "--dataset", text_file, "--num-samples", 4, "--max-seq-len", 32]
    path = Path(last_json(run("calibrate", *options, "--no-fisher"))["statistics"])
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["layers.1.input.mean_abs"][3] = float("nan")
    save_file(tensors, path, metadata=metadata)
    line = mistake(run("train", *options, "--use_asvd"))
    assert "input.mean_abs of layer 1 holds NaN" in line


def test_statistics_of_another_model(run: Run, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1, hidden_size=64)
    options = ["--dataset", text_file, "--num-samples", 4, "--max-seq-len", 32]
    path = last_json(run("calibrate", "--model-path", model_folder, *options, "--no-fisher"))["statistics"]
    line = mistake(run("train", "--model-path", other, *options, "--use_asvd", "--statistics", path))
    assert "hidden_size 32, this model has 64" in line


def test_a_model_that_overflows(run: Run, text_file: Path, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "overflowing", seed=0)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(float("inf"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = ["--model-path", folder, "--dataset", text_file, "--num-samples", 4, "--max-seq-len", 32]
    for moments in ("--covariance", "--no-covariance"):
        assert "NaN or infinity" in mistake(run("calibrate", *options, moments))


def test_ctrl_c_keeps_the_checkpoint_and_the_same_command_continues(
    start: Callable[..., subprocess.Popen[str]], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ["--model-path", model_folder, "--dataset", text_file, "--max-seq-len", 32, "--num-samples", 100]
    options += ["--epochs", 8, "--output", "adapter", "--checkpoint-every", 100000, "--learning-rate", 1e-3]
    options += ["--init", "svd"]
    process = start("train", *options)
    log = tmp_path / "adapter" / "train_log.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert not stdout
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: interrupted: the last checkpoint is kept in adapter; run the same command again to continue"
    ]
    assert "Traceback" not in stderr
    done = log.read_text().count("\n")
    assert done < 800
    process = start("train", *options)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["steps"] == 800
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 801))

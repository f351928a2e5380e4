from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run
from tests.cli.support import mistake

COMMANDS = ("calibrate", "train", "generate", "analyze", "inspect", "report", "export", "doctor")
PAPER_FLAGS = {
    "calibrate": "model_path model_id max_seq_len training_dataset asvd_calib_root attn_impl logging_level",
    "train": "model_path model_id max_seq_len k_density v_density use_asvd use_window q_window_size k_bits v_bits "
    "training_dataset epoches warmup_steps learning_rate ckpt_save_path asvd_calib_root attn_impl use_init_params "
    "logging_level",
    "generate": "model_path model_id k_density v_density use_asvd use_window q_window_size k_bits v_bits "
    "kv_ckpt_root_path asvd_calib_root attn_impl use_origin_model use_init_params logging_level",
}


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"cskv {metadata.version('cskv')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"cskv {name}" in result.stdout


@pytest.mark.parametrize(
    ("name", "flag"), [(name, flag) for name, flags in PAPER_FLAGS.items() for flag in flags.split()]
)
def test_the_papers_flags_are_known_in_both_spellings(run: Run, name: str, flag: str) -> None:
    for spelling in (flag, flag.replace("_", "-")):
        # `--help` is read before anything runs, and an unknown option is refused all the same.
        result = run(name, f"--{spelling}", *([] if flag.startswith("use_") else ["1"]), "--help")
        assert result.exit_code == 0, result.stderr


def test_an_unknown_option_is_refused(run: Run) -> None:
    result = run("train", "--no_such_option", "--help")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_options_with_underscores_keep_the_values_underscores(run: Run) -> None:
    assert "./my_model_folder" in mistake(run("calibrate", "--model_path", "./my_model_folder"))


def test_running_out_of_gpu_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")

    monkeypatch.setattr("cskv.cli.loading.load_model", load_model)
    monkeypatch.setattr("cskv.cli.loading.load_tokenizer", lambda _path: lambda _text, **_kwargs: {"input_ids": None})
    line = mistake(run("generate", "--model-path", "a", "--use-origin-model", "--prompt", "a"))
    assert line.startswith("error: out of GPU memory")
    assert line.endswith("Tried to allocate 20.00 GiB)")


def test_other_runtime_errors_are_bugs_and_stay_loud(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("cskv.cli.choose.AdapterChoice.find", find)
    with pytest.raises(RuntimeError, match="a bug"):
        run("generate", "--model-path", "a", "--prompt", "a")


def test_inspect_refuses_what_is_no_adapter(run: Run, model_folder: Path) -> None:
    assert "does not exist" in mistake(run("inspect", "nowhere"))
    assert "is not a cskv adapter" in mistake(run("inspect", model_folder))


def test_a_real_process_prints_one_line_and_exits_with_2(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("inspect", "nowhere")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert stdout == ""
    assert stderr == "error: adapter folder 'nowhere' does not exist; expected one that `cskv train` wrote\n"

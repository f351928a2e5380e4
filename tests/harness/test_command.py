"""`cskv lm-eval` and `python -m cskv.harness` as processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.support import CHECKPOINT, ROOT

pytest.importorskip("lm_eval")

Done = subprocess.CompletedProcess[str]


def start(module: str, *args: object) -> Done:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *module.split(), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_run_writes_results_with_our_facts(tasks: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    done = start("cskv.cli lm-eval", "run", "--model", "cskv", "--model_args", f"adapter={adapters['low']},window=16",
                 "dtype=float32", "--tasks", "local_rolling,local_lines", "--include_path", tasks, "--limit", 2,
                 "--batch_size", 2, "--output_path", tmp_path, "--log_samples")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "local_rolling" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["config"]["cskv"]["settings"]["window"] == 16
    assert results["config"]["cskv"]["settings"]["k_density"] == 0.25
    assert results["n-samples"]["local_lines"]["effective"] == 2
    assert list(tmp_path.rglob("samples_local_lines_*.jsonl"))


def test_the_old_form_without_run_works(tasks: Path, adapters: dict[str, str]) -> None:
    done = start("cskv.harness", "--model", "cskv", "--model_args", f"adapter={adapters['low']}", "--tasks",
                 "local_choice", "--include_path", tasks, "--limit", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout


@pytest.mark.parametrize(
    ("module", "model_args", "message"),
    [
        ("cskv.cli lm-eval", f"adapter={CHECKPOINT}", "is not a cskv adapter"),
        ("cskv.harness", f"pretrained={CHECKPOINT}", "no adapter was given"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tasks: Path, module: str, model_args: str, message: str) -> None:
    done = start(module, "run", "--model", "cskv", "--model_args", model_args, "--tasks", "local_choice",
                 "--include_path", tasks)  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr


def test_help_and_exit_codes_are_the_harnesss() -> None:
    shown = start("cskv.cli lm-eval", "run", "--help")
    assert shown.returncode == 0
    used = set()
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for call in re.findall(r"\bcskv lm-eval +run(.*)", block.replace("\\\n", " ")):
                used.update(re.findall(r"--[a-z_]+", call))
    assert {"--model_args", "--metadata"} <= used
    assert {option for option in used if option not in shown.stdout} == set()
    assert start("cskv.cli lm-eval", "--help").stdout.startswith("usage: lm-eval")
    refused = start("cskv.cli lm-eval", "run", "--no_such_option", "1")
    assert refused.returncode == 2
    assert "unrecognized arguments: --no_such_option" in refused.stderr


def test_an_adapter_is_never_scored_uncompressed_by_the_harnesss_own_model(
    tasks: Path, adapters: dict[str, str]
) -> None:
    """`lm_eval --model hf` does not know adapters; in our command it would, so there it is refused."""
    args = ("run", "--model", "hf", "--model_args", f"pretrained={adapters['low']},tokenizer={CHECKPOINT}",
            "--tasks", "local_choice", "--include_path", tasks, "--device", "cpu")  # fmt: skip
    theirs = start("lm_eval", *args)
    assert theirs.returncode != 0
    assert "model type `cskv`" in theirs.stderr
    ours = start("cskv.cli lm-eval", *args)
    assert ours.returncode == 2
    assert "give --model cskv --model_args adapter=" in ours.stderr

"""Training in processes of its own: killed at any moment, and on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cskv.training.log import read_log
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train
from tests.training.tiny import factors_of, tiny_model, token_samples, untrained

ROOT = Path(__file__).parents[2]


def program(*arguments: str) -> str:
    paths = [str(ROOT), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_bit_identically(tmp_path: Path) -> None:
    outcome = json.loads(program("-m", "tests.training.kill_program", str(tmp_path), "0"))
    assert outcome["kills"] > 0
    assert outcome["resumed_from"] > 0
    assert outcome["identical"]
    assert outcome["steps"] == list(range(1, 81))
    assert outcome["left"] == ["step-00000080"]


def test_two_ranks_equal_one_process_that_accumulates(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    program(*launcher, "tests.training.rank_program", str(tmp_path), "3")
    ranks = [load_file(tmp_path / f"rank-{rank}-of-2.safetensors") for rank in range(2)]
    adapter = untrained(tiny_model())
    settings = TrainingSettings(learning_rate=1e-2, epochs=3, accumulation=2, max_grad_norm=0.5)
    result = train(tiny_model(), adapter, token_samples(7), settings, output=tmp_path / "one")
    assert result.steps == 9
    for name, tensor in factors_of(adapter).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-4, atol=1e-5)
    two, one = read_log(tmp_path / "train_log.jsonl"), read_log(tmp_path / "one" / "train_log.jsonl")
    assert [(r.step, r.tokens) for r in two] == [(r.step, r.tokens) for r in one]
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], rel=1e-4)

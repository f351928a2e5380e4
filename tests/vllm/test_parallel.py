"""Two ranks answer as one does: each keeps its own heads, or its own layers, and what latents these need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.models.families import full_rank_adapter, truncated_adapter
from tests.vllm.engines import MIB, answers, engine, prompts, save_base, save_compressed
from tests.vllm.test_answers import config, grouped_adapter

PROGRAM = Path(__file__).parent / "answer_program.py"
POOL = 8 * MIB


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("parallel") / "base"
    return save_base(folder, "qwen3", num_key_value_heads=4, num_hidden_layers=4), folder


def in_parallel(model: Path, asked: list[list[int]], **options: Any) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    settings = {"kv_cache_memory_bytes": POOL, "distributed_executor_backend": "mp", "enforce_eager": True} | options
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(model), json.dumps(settings), json.dumps(asked)],
        env={
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"answers"')]
    return json.loads(lines[-1]) | {"log": run.stdout + run.stderr}


def test_tensor_parallel_ranks_keep_the_latents_of_their_head_groups(
    base: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, folder = base
    asked = prompts(3, seed=7)
    with engine(folder, kv_cache_memory_bytes=POOL) as llm:
        expected = [tokens for tokens, _ in answers(llm, asked)]
    adapter = grouped_adapter(model, config(window=8, group=4, sinks=4, head_groups=2))
    compressed = save_compressed(folder, adapter, tmp_path / "out")
    with engine(compressed, kv_cache_memory_bytes=POOL) as llm:
        alone = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    found = in_parallel(compressed, asked, tensor_parallel_size=2)
    assert found["answers"] == expected
    assert found["tokens"] >= 1.8 * alone  # the pool is that of each rank
    assert "repeat the latents" not in found["log"]


def test_tensor_parallel_ranks_that_repeat_latents_say_so_and_answer_the_same(
    base: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, folder = base
    asked = prompts(3, seed=8)
    adapter = truncated_adapter(model, config(0.25, k_bits=8, v_bits=8))
    compressed = save_compressed(folder, adapter, tmp_path / "out")
    with engine(compressed, kv_cache_memory_bytes=POOL) as llm:
        expected = [tokens for tokens, _ in answers(llm, asked)]
    found = in_parallel(compressed, asked, tensor_parallel_size=2)
    assert found["answers"] == expected
    assert (
        "on 2 tensor-parallel ranks, which repeat the latents, the cache is 7.1 times smaller, not 14.2" in found["log"]
    )


def test_pipeline_stages_answer_as_one_process(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Compiled as well: vLLM's CPU worker skips a preparation that stages need where it is eager."""
    model, folder = base
    asked = prompts(3, seed=9)
    with engine(folder, kv_cache_memory_bytes=POOL) as llm:
        expected = [tokens for tokens, _ in answers(llm, asked)]
    adapter = full_rank_adapter(model, config(window=8, group=8, sinks=4, k_bits=16))
    compressed = save_compressed(folder, adapter, tmp_path / "out")
    found = in_parallel(compressed, asked, pipeline_parallel_size=2, enforce_eager=False)
    assert found["answers"] == expected

"""Checkpoints of tiny models for vLLM, and engines of vLLM in this process."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cskv
from tests.models.families import tiny_model

SHAPE = {
    "hidden_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 512,
}  # vLLM's own attention on a CPU has no smaller heads
MIB = 2**20


def save_base(folder: Path, family: str = "llama", **changes: Any) -> nn.Module:
    """A tiny random model and its folder."""
    model = tiny_model(family, **(SHAPE | changes))
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def save_compressed(base: Path, adapter: cskv.CSKVAdapter, folder: Path, **settings: int) -> Path:
    """A checkpoint that vLLM loads compressed."""
    shutil.copytree(base, folder)
    adapter.save_pretrained(folder / "cskv")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [f"CSKV{config['architectures'][0]}"]
    config["cskv"] = {"adapter": "cskv", **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An engine in this process, so that tests need not start three of them each time."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 8 * MIB,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": True,
    }
    llm = LLM(model=str(model), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(count: int, seed: int = 0, longest: int = 200, vocabulary: int = 96) -> list[list[int]]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def answers(llm: Any, asked: list[list[int]], tokens: int = 24) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], settings, use_tqdm=False)
    found = []
    for output in outputs:
        answer = output.outputs[0]
        chosen = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        found.append((list(answer.token_ids), chosen))
    return found


def check_same(
    found: list[tuple[list[int], list[float]]], expected: list[tuple[list[int], list[float]]], off_by: float = 1e-4
) -> None:
    """Answers agree token by token, to the first at which two are equally likely but for rounding."""
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(found, expected, strict=True):
        same = [*map(int.__eq__, tokens, expected_tokens), False].index(False)
        assert logprobs[: same + 1] == pytest.approx(expected_logprobs[: same + 1], abs=off_by)


def reused(llm: Any, prompt: list[int]) -> int:
    """Tokens of a prompt that were found in the prefix cache."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    return output.num_cached_tokens

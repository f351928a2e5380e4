"""Made-up result files of the size of a real comparison, with the shapes that real ones have."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cskv.evaluation.results import Run
from cskv.evaluation.wilson import wilson_interval

METHODS = {  # the budget at which half of the questions are answered
    "SVD": 0.28,
    "ASVD": 0.26,
    "PCA": 0.11,
    "weighted PCA": 0.10,
    "weighted PCA, allocated ranks": 0.05,
    "PCA, distilled": 0.09,
    "commuting keys": 0.24,
    "PCA, 4-bit latents": 0.07,
    "KIVI": 0.13,
    "StreamingLLM": 0.90,
    "H2O": 0.60,
    "SnapKV": 0.12,
    "quanto, 2 bit": 0.20,
}
BUDGETS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROTOCOLS = ("in-prefill", "context-first")
CONTEXT_FIRST_WORSE = {"SnapKV": 4.0, "H2O": 1.3}
BYTES = 6144
MODEL = {
    "name": "made-up-7b", "type": "llama", "layers": 32, "kv_dim": 1024, "parameters": 7_000_000_000,
    "dtype": "bfloat16", "fingerprint": "0123456789abcdef",
}  # fmt: skip
ENVIRONMENT = {
    "cpu": "A made-up processor", "cores": 2, "threads": 1, "accelerator": None, "python": "3.11.2", "torch": "2.13.0",
    "transformers": "5.24.0", "triton": "not installed", "cskv": "0.1.0", "date": "2026-11-25T10:00:00+00:00",
}  # fmt: skip


def make_run(
    path: Path,
    methods: Sequence[str] = tuple(METHODS),
    budgets: Sequence[float] = BUDGETS,
    seeds: Sequence[int] = (0, 1),
    **environment: Any,
) -> Run:
    """A run of every task, not yet written."""
    rows = [row for seed in seeds for method in methods for budget in budgets for row in rows_of(method, budget, seed)]
    rows += [row for seed in seeds for row in rows_of("uncompressed", None, seed)]
    described = {name: {"kind": "adapter", "window": 32} for name in ("uncompressed", *methods)}
    settings = {"tasks": ["lines", "needle"], "cases": 50, "window": 32, "dataset": "offline", "seeds": list(seeds)}
    return Run(path, settings, dict(MODEL), ENVIRONMENT | environment, described, rows)


def rows_of(method: str, budget: float | None, seed: int) -> Iterable[dict[str, Any]]:
    """All rows of one method at one budget."""
    half = METHODS.get(method, 0.1)
    chance = random.Random(f"{method} {budget} {seed}")
    harm = 0.0 if budget is None else 0.02 + math.exp(-3 * budget / half)
    for protocol in PROTOCOLS:
        shift = half * (CONTEXT_FIRST_WORSE.get(method, 1.0) if protocol == "context-first" else 1.0)
        for size in (100, 200):
            share = _share(budget, shift * size / 150)
            yield _row(method, budget, "lines", size, protocol, seed) | _scored(round(50 * share))
        for task, hard in (("needle", 1.0), ("needle-pairs", 1.6)):
            for size in (1024, 2048, 4096):
                shares = [
                    _share(budget, shift * hard * (1.15 - 0.3 * abs(depth - 0.5)) * size / 2048) for depth in DEPTHS
                ]
                right = [min(10, max(0, round(10 * share + chance.uniform(-0.6, 0.6)))) for share in shares]
                cells = [{"depth": depth, "n": 10, "score": count / 10} for depth, count in zip(DEPTHS, right)]
                yield _row(method, budget, task, size, protocol, seed) | _scored(sum(right)) | {"cells": cells}
    nll = math.log(17.4) + 2.2 * harm * (half + 0.05) + chance.uniform(-0.01, 0.01)
    figures = {"tokens": 2000, "perplexity": math.exp(nll), "nll": nll}
    yield _row(method, budget, "perplexity", 2048, None, seed) | figures
    stretches = [
        {"start": start, "stop": start + 256, "top1": 1 - 0.4 * _grown(harm, start), "kl": 0.5 * _grown(harm, start)}
        for start in range(0, 2048, 256)
    ]
    means = {name: sum(part[name] for part in stretches) / len(stretches) for name in ("top1", "kl")}
    yield _row(method, budget, "agreement", 2048, None, seed) | means | {"tokens": 2047, "positions": stretches}


def _grown(harm: float, start: int) -> float:
    return min(1.0, harm * (0.4 + start / 2048))


def _share(budget: float | None, half: float) -> float:
    return 1.0 if budget is None else 1 / (1 + (half / budget) ** 3)


def _scored(right: int) -> dict[str, Any]:
    low, high = wilson_interval(right, 50)
    return {"n": 50, "score": right / 50, "low": low, "high": high}


def _row(method: str, budget: float | None, task: str, size: int, protocol: str | None, seed: int) -> dict[str, Any]:
    tokens = 22 * size if task == "lines" else size
    window = 0.0 if budget is None else 32 / tokens + 0.004 * (len(method) % 4)
    ratio = 1.0 if budget is None else min(1.0, budget + window)
    return {
        "method": method, "budget": budget, "task": task, "size": size, "protocol": protocol, "seed": seed,
        "cache": {"tokens": tokens, "ratio": ratio, "bytes_per_token": ratio * BYTES},
    }  # fmt: skip

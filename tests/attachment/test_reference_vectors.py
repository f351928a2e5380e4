"""Runs of the authors' own implementation, reproduced through the public API and a real model.

A folder of runs is given by `--reference-vectors DIR`; each holds a model, factors, settings and teacher-forced logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cskv
from cskv.models.compat import cache_kwarg, output_cache
from cskv.models.survey import survey


def test_official_run_is_reproduced(reference_run: Path) -> None:
    settings = json.loads((reference_run / "settings.json").read_text())
    if settings["k_bits"] != 16 or settings["v_bits"] != 16:
        pytest.skip("a quantised run")
    model = AutoModelForCausalLM.from_pretrained(reference_run, dtype=torch.float32).eval()
    run = load_file(reference_run / "run.safetensors")
    tokens, prefill = run["input_ids"].long(), settings["prompt_len"]
    with cskv.attach(model, _adapter(model, reference_run, settings)), torch.no_grad():
        outputs = model(tokens[:, :prefill], use_cache=True)
        logits = [outputs.logits[:, -1]]
        for step in range(prefill, prefill + settings["steps"] - 1):
            outputs = model(tokens[:, step : step + 1], **{cache_kwarg(model): output_cache(outputs)})
            logits.append(outputs.logits[:, -1])
    assert (torch.cat(logits) - run["logits"]).abs().max() < 1e-4


def _adapter(model: torch.nn.Module, folder: Path, settings: dict) -> cskv.CSKVAdapter:
    tensors = load_file(folder / "factors.safetensors")

    def factors(layer: int, kind: str) -> cskv.Factors:
        return cskv.Factors(tensors[f"layers.{layer}.{kind}.down"], tensors[f"layers.{layer}.{kind}.up"])

    layers = {i: cskv.LayerFactors(factors(i, "k"), factors(i, "v")) for i in range(model.config.num_hidden_layers)}
    config = cskv.CSKVConfig(
        settings["k_density"],
        settings["v_density"],
        window=0,
        group=settings["q_window_size"] if settings["use_window"] else 1,
        sinks=0,
    )
    return cskv.CSKVAdapter(config, layers, survey(model).base)

"""Prints the Python calls of a layer in a decode step; of compiled steps the graphs and the largest error of a logit.

A program of its own: the shape checks that tests run under cannot be traced.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import cskv
from cskv.models.compat import cache_kwarg, output_cache
from tests.attachment.test_decode_step import SETTINGS, prefilled
from tests.models.families import full_rank_adapter, tiny_model

STEPS = 4


def python() -> dict[str, int]:
    """Count the calls of functions in `cskv`, and their files, of one layer in one step."""
    root, files = str(Path(cskv.__file__).parent), list[str]()

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            files.append(frame.f_code.co_filename)

    with prefilled("packed") as (model, cache):
        layer = model.model.layers[1]  # the first also stores positions
        layer.input_layernorm.register_forward_hook(lambda *_: sys.setprofile(note))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda *_: sys.setprofile(None))
        model(torch.tensor([[5]]), **{cache_kwarg(model): cache})
    return {"calls": len(files), "files": len(set(files))}


def growing() -> dict[str, float]:
    """Decode until tokens are sealed and every buffer has grown; `torch.compile` gives up after `limit` graphs."""
    config = cskv.CSKVConfig(1.0, 1.0, window=8, group=8, sinks=4)
    model, prompt = tiny_model("llama"), torch.arange(5, 49)[None]
    tokens = torch.randint(5, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    counters.clear()
    compiled, logits = torch.compile(model, backend="eager"), []
    with torch.no_grad(), cskv.attach(model, full_rank_adapter(model, config)):
        for run in (model, compiled):
            cache = output_cache(model(prompt, use_cache=True))
            own = [run(token[None, None], **{cache_kwarg(model): cache}).logits for token in tokens[0]]
            logits.append(torch.stack(own))
    return {
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["frames"]["total"],
        "limit": torch._dynamo.config.recompile_limit,
        "error": float((logits[0] - logits[1]).abs().max()),
        "sealed": cache.layers[0].store.sealed,
    }


def main() -> None:
    outcomes = {}
    for name in SETTINGS:
        with prefilled(name) as (model, cache):
            caches = copy.deepcopy(cache), cache
            torch._dynamo.reset()
            counters.clear()
            compiled = torch.compile(model.forward, backend="eager")
            logits = [
                torch.stack([forward(torch.tensor([[5]]), **{cache_kwarg(model): own}).logits for _ in range(STEPS)])
                for forward, own in zip((model.forward, compiled), caches)
            ]
        outcomes[name] = {
            "breaks": sum(counters["graph_break"].values()),
            "graphs": counters["stats"]["unique_graphs"],
            "error": float((logits[0] - logits[1]).abs().max()),
        }
    print(json.dumps(outcomes | {"growing": growing(), "python": python()}))


if __name__ == "__main__":
    main()

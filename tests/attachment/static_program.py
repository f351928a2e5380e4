"""Prints what compiling decode steps on a static cache gives: graphs, breaks, and the largest error of a logit.

A program of its own: the shape checks that tests run under cannot be traced.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig, StaticCache

from cskv.models.compat import cache_kwarg
from tests.attachment.test_static_cache import GROUP, SETTINGS, attached

STEPS = 3 * GROUP + 1
MOST = 64


def by_hand(name: str, backend: str) -> dict[str, Any]:
    """Compile `forward` as one graph of constant shapes, and decode beyond three groups."""
    draw = torch.Generator().manual_seed(1)
    prompt, tokens = (torch.randint(3, 96, shape, generator=draw) for shape in ((2, 14), (STEPS, 2, 1)))
    logits, sealed = [], 0
    _forget()
    with torch.no_grad(), attached("llama", name) as model:
        for run in (model.forward, torch.compile(model.forward, backend=backend, dynamic=False, fullgraph=True)):
            cache = {cache_kwarg(model): StaticCache(config=model.config, max_cache_len=MOST)}
            model(prompt, **cache)
            logits.append(torch.stack([run(token, **cache).logits for token in tokens]))
            sealed = int(next(iter(cache.values())).layers[0].clock.sealed[0])
    return _outcome() | {"error": float((logits[0] - logits[1]).abs().max()), "sealed": sealed}


def in_generate() -> dict[str, Any]:
    """Let `generate` compile its steps, as it does by itself on a GPU."""
    prompt, answers = torch.randint(3, 96, (2, 14), generator=torch.Generator().manual_seed(1)), []
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    compiling._compile_all_devices = True
    _forget()
    with attached("llama", "packed") as model:
        for static in (False, True, True):
            config = GenerationConfig(
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
                cache_implementation="static" if static else None,
                compile_config=compiling if static else None,
            )
            answers.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config))
    return _outcome() | {"same": all(torch.equal(answers[0], answer) for answer in answers[1:])}


def operations() -> list[str]:
    """The operations of ours that a compiler sees whole."""
    found: set[str] = set()

    def note(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    _forget()
    with torch.no_grad(), attached("llama", "packed") as model:
        cache = {cache_kwarg(model): StaticCache(config=model.config, max_cache_len=MOST)}
        model(torch.full((1, 9), 5), **cache)
        torch.compile(model.forward, backend=note, dynamic=False, fullgraph=True)(torch.tensor([[5]]), **cache)
    return sorted(name for name in found if name.startswith("cskv"))


def _forget() -> None:
    torch._dynamo.reset()
    counters.clear()


def _outcome() -> dict[str, Any]:
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def main() -> None:
    logging.disable(logging.WARNING)
    outcomes = {f"{name}-{backend}": by_hand(name, backend) for name in SETTINGS for backend in ("eager", "aot_eager")}
    print(json.dumps(outcomes | {"generate": in_generate(), "operations": operations()}))


if __name__ == "__main__":
    main()

"""Prints, of compiled decode steps, the graph breaks, the graphs and the largest error of a logit.

A program of its own: the shape checks that tests run under cannot be traced.
"""

from __future__ import annotations

import copy
import json

import torch
from torch._dynamo.utils import counters

from cskv.models.compat import cache_kwarg
from tests.attachment.test_decode_step import SETTINGS, prefilled

STEPS = 4


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
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()

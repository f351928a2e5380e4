"""Fill layers with the keys and values of 16K tokens, and print the bytes that they count and the process grew by."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from cskv.cache.bibranch import BiBranchStore
from cskv.quantization.grid import Grid

TOKENS, HEADS, HEAD_DIM, RANK = 16384, 8, 128, 164  # an 8B model's, and 16 % of its 1024 channels
LAYERS = {"compressed": 20, "uncompressed": 8}
# Random, since pages of zeros need not exist.
EXACT = torch.randn(1, HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
LATENTS = torch.randn(1, TOKENS, RANK, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def resident_bytes() -> int:
    """Of the machine's memory, what the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def compressed() -> tuple[object, int]:
    """A layer's store, prefilled at once, and the bytes that it counts."""
    grid = Grid.uniform(RANK, 4, (32, 4))
    store = BiBranchStore(32, 32, grid, grid)
    store.append(LATENTS.clone(), LATENTS.clone(), EXACT.clone(), EXACT.clone())
    return store, store.nbytes()


def uncompressed() -> tuple[object, int]:
    """A layer's keys and values, and their bytes."""
    return (EXACT.clone(), EXACT.clone()), 2 * EXACT.nbytes


def measured(fill: Callable[[], tuple[object, int]], layers: int) -> dict[str, float]:
    """Per layer; the first, which brings code and buffers of its own with it, is not measured."""
    fill()
    before = resident_bytes()
    held = [fill() for _ in range(layers)]
    grown = resident_bytes() - before
    return {"counted": sum(size for _, size in held) / layers, "grown": grown / layers}


if __name__ == "__main__":
    torch.set_num_threads(1)
    fills = {"compressed": compressed, "uncompressed": uncompressed}
    print(json.dumps({name: measured(fill, LAYERS[name]) for name, fill in fills.items()}))

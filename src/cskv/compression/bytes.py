"""Bytes of a cached token under an adapter, computed from its ranks and grids."""

from __future__ import annotations

import torch

from cskv.adapter.adapter import CSKVAdapter


def bytes_per_token(adapter: CSKVAdapter, dtype: torch.dtype) -> tuple[int, float]:
    """Count the bytes of a token's keys and values and of its latents, over all layers of an adapter.

    Codes, minima and scales of full blocks count; the window, positions and slack come on top.

    Args:
        adapter: any.
        dtype: of the model, and of latents that are not quantised.

    Returns:
        (uncompressed bytes, bytes of the sealed token).
    """
    uncompressed, compressed = 0, 0.0
    for index in adapter.layer_indices:
        factors = adapter.factors(index)
        for part, grid in zip((factors.k, factors.v), adapter.grids(index), strict=True):
            uncompressed += part.kv_dim * dtype.itemsize
            compressed += part.rank * (dtype.itemsize if grid is None else grid.bits_per_latent / 8)
    return uncompressed, compressed


def ratio_of(adapter: CSKVAdapter) -> float:
    """Return the bytes of a sealed token as a share of its keys and values in 16 bits (`bytes_per_token`)."""
    uncompressed, compressed = bytes_per_token(adapter, torch.bfloat16)
    return compressed / uncompressed

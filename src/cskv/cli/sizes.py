"""A cache's bytes, for a person."""

from __future__ import annotations

from typing import Any

NAMES = {
    "payload": "latents",
    "scale": "scales",
    "minimum": "minima",
    "window": "exact window",
    "position": "positions",
    "slack": "slack",
    "other": "uncompressed layers",
}


def cache_lines(sizes: dict[str, Any]) -> list[str]:
    """Two lines on the sizes that `CacheReport.to_dict` gives; parts of no bytes are left out."""
    parts = ", ".join(f"{name} {sizes[f'{key}_bytes']:,}" for key, name in NAMES.items() if sizes[f"{key}_bytes"])
    return [
        f"cache of {sizes['tokens']:,} tokens: {sizes['total_bytes']:,} bytes allocated ({parts})",
        f"uncompressed it would take {sizes['uncompressed_bytes']:,} bytes; this is {sizes['ratio']:.1%} of it",
    ]

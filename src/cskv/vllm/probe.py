"""A check by experiment that a vLLM layer's keys can be rebuilt from its projection, as `cskv.models.probe` does it.

Some tokens go through the layer's own forward; what it projects, and what it hands to its attention, are compared with
every combination of norm and rotation. A layer that matches none is refused when the server starts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cskv.attention.inputs import Rotation, split_heads
from cskv.errors import UnsupportedModelError
from cskv.models.placement import device_of
from cskv.models.recipe import (
    KEY_NORMS,
    TOLERANCE,
    NormStyle,
    Recipe,
    RopeStyle,
    Rotate,
    candidates,
    closest,
    kernel_norm,
)

TOKENS = 8

_tables: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()


class _Recorder(nn.Module):
    """Stands in for the attention of a layer, and keeps the keys and values that it is handed, (tokens, kv_dim)."""

    given: tuple[Tensor, Tensor] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        self.given = key.clone().flatten(1), value.clone().flatten(1)
        return torch.zeros_like(query.flatten(1))


@torch.no_grad()
def find_rope(
    parent: Any, forward: Any, child: str, hidden_size: int, head_dim: int, dtype: torch.dtype, *, alone: bool = False
) -> Rotation | None:
    """Find how rebuilt keys become those that queries meet; None where they are those already.

    Args:
        parent: vLLM's attention module, with its weights.
        forward: its own forward, a function of itself, positions and hidden states.
        child: the name of its attention layer.
        hidden_size: channels of the layer's input.
        head_dim: channels per head.
        dtype: the layer's compute dtype.
        alone: return RoPE alone, without the norm.

    Raises:
        UnsupportedModelError: its keys or values follow from its projection by no known norm and rotation.
    """
    device = device_of(parent)
    x = torch.randn(TOKENS, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = x.to(device, dtype)
    positions = torch.arange(TOKENS, device=device)
    keys, values = _record(parent, forward, child, positions, x)
    _, k, v = parent.qkv_proj(x)[0].split([parent.q_size, keys.shape[1], keys.shape[1]], dim=-1)
    tables = _cos_sin(parent, dtype)
    found = _match(parent, k, keys, tables, head_dim)
    if not torch.equal(v, values):
        raise UnsupportedModelError(f"the values of {type(parent).__name__} are not its projection; it is not served")
    if alone:
        found = replace(found, norm=None, norm_style=NormStyle.NONE)
    if found.rope_style is RopeStyle.NONE:
        return None if found.norm_style is NormStyle.NONE else Rotation(None, None, found.heads)
    cos, sin = tables  # type: ignore[misc]
    plain = bool(getattr(parent.rotary_emb, "is_neox_style", False))
    norm = kernel_norm(found, split_heads(k[None], head_dim))
    is_plain = plain and (found.norm_style is NormStyle.NONE or norm is not None)
    return Rotation(cos[None], sin[None], found.heads, is_plain, norm, is_symmetric=plain)


def _record(parent: Any, forward: Any, child: str, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    attention = getattr(parent, child)
    recorder = _Recorder()
    setattr(parent, child, recorder)
    try:
        forward(parent, positions=positions, hidden_states=x)
    finally:
        setattr(parent, child, attention)
    if recorder.given is None:
        raise UnsupportedModelError(f"{type(parent).__name__} did not call its attention; it is not served")
    return recorder.given


def _cos_sin(parent: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return cos and sin of all positions, (positions, rotary_dim), shared by all layers with the same embedding."""
    rotary = getattr(parent, "rotary_emb", None)
    cache = getattr(rotary, "cos_sin_cache", None)
    if rotary is None or cache is None:
        return None
    if rotary not in _tables:
        halves = getattr(rotary, "is_neox_style", False)
        cos, sin = (
            torch.cat([part, part], dim=-1) if halves else part.repeat_interleave(2, dim=-1)
            for part in cache.to(dtype).chunk(2, dim=-1)
        )
        _tables[rotary] = cos, sin
    return _tables[rotary]


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves (Llama), on (batch, heads, tokens, rotary_dim)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _rotate_neighbours(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels (GLM, Cohere)."""
    turned = torch.stack([-heads[..., 1::2], heads[..., 0::2]], dim=-1).flatten(-2)
    return heads * cos[:, None] + turned * sin[:, None]


def _match(parent: Any, k: Tensor, keys: Tensor, tables: Any, head_dim: int) -> Recipe:
    """Find the recipe of a layer's keys, (tokens, kv_dim), from what its projection makes, of the same shape."""
    rotations: list[tuple[RopeStyle, Rotate | None]] = [(RopeStyle.NONE, None)]
    cos = sin = None
    if tables is not None:
        cos, sin = (part[None, : len(k)] for part in tables)
        rotate = _rotate if getattr(parent.rotary_emb, "is_neox_style", False) else _rotate_neighbours
        rotations.insert(0, (RopeStyle.FULL if cos.shape[-1] == head_dim else RopeStyle.SLICED, rotate))
    cached = keys.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None]
    recipe, error = closest(candidates(parent, KEY_NORMS, head_dim, rotations), k[None], cos, sin, cached)
    if recipe is None or not error <= TOLERANCE.get(keys.dtype, 3e-2):
        raise UnsupportedModelError(
            f"the keys of {type(parent).__name__} follow from its projection by no known norm and rotation (the "
            f"closest is off by {error:.1e} of the largest); this model is not served"
        )
    return recipe

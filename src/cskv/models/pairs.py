"""Which channels a model's RoPE turns together, found by turning unit vectors.

Families pair channel j with j + rotary_dim / 2 (Llama) or with its neighbour (GLM, Cohere), and rotate all of a head or
a part of it. Rather than from a table, the pairing is read off the rotation itself: every frequency is given the same
clear angle, since only which channels mix matters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cskv.errors import UnsupportedModelError
from cskv.factorization.commuting import RopePairs
from cskv.models.recipe import Recipe

ANGLE = 0.75  # radians: neither cos nor sin is near zero


def find_pairs(keys: Recipe, cos: Tensor) -> RopePairs:
    """The pairs of a layer.

    Args:
        keys: the layer's recipe; its keys are rotated.
        cos: (batch or 1, tokens, rotary_dim), as the layer is given it; only its width counts.

    Raises:
        UnsupportedModelError: the rotation turns other than pairs of channels.
    """
    turned = _turned_unit_vectors(keys, cos.shape[-1])
    partners: dict[int, int] = {}
    for channel, row in enumerate(turned):
        others = [other for other in row.nonzero().flatten().tolist() if other != channel]
        if len(others) > 1:
            raise UnsupportedModelError(f"RoPE turns channel {channel} into {len(others)} others; expected one partner")
        if others:
            partners[channel] = others[0]
    if any(partners.get(partner) != channel for channel, partner in partners.items()):
        raise UnsupportedModelError(f"RoPE's partners are not mutual: {partners}")
    # A real unit vector becomes cos e_real + sin e_imaginary; an imaginary one gets -sin.
    real = [channel for channel, partner in sorted(partners.items()) if turned[channel, partner] > 0]
    imaginary = [partners[channel] for channel in real]
    rest = [channel for channel in range(keys.head_dim) if channel not in partners]
    return RopePairs(*(torch.tensor(channels, dtype=torch.long) for channels in (real, imaginary, rest)))


def _turned_unit_vectors(keys: Recipe, width: int) -> Tensor:
    """(head_dim, head_dim): row i is unit vector i after the rotation."""
    vectors = torch.eye(keys.head_dim, dtype=torch.float64)[None, None]
    shape = (1, keys.head_dim, width)
    return keys.rotated(
        vectors,
        torch.full(shape, math.cos(ANGLE), dtype=torch.float64),
        torch.full(shape, math.sin(ANGLE), dtype=torch.float64),
    )[0, 0]

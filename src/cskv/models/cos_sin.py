"""Cos and sin for keys that were sealed long ago: recomputed from position numbers, or kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cskv.errors import UnsupportedModelError
from cskv.models.calls import AttentionCall

PIECE = 1024  # tokens whose cos and sin are made at a time on a CPU
# Scalings in which cos and sin are a function of the position alone (transformers' `rope_type`).
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


class StoredCosSin:
    """Keeps cos and sin themselves: 2 * rotary_dim numbers a token, shared by all layers.

    For embeddings that change with the length of the sequence (dynamic, longrope), read several positions a token
    (mRoPE), or are not understood.
    """

    def rows(self, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Return the tensors that a `PositionTable` stores for the tokens of a forward."""
        return cos, sin

    def cos_sin(self, rows: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (batch or 1, tokens, rotary_dim), of stored rows. `x` gives dtype and device."""
        cos, sin = rows
        return cos.to(x.device), sin.to(x.device)


@dataclass(frozen=True)
class FixedCosSin:
    """Keeps position numbers only: 4 bytes a token, shared by all layers.

    Attributes:
        embedding: the model's rotary embedding, called as `embedding(x, position_ids, *extra)`.
        extra: `(layer_type,)` for embeddings that serve several kinds of layers (Gemma3), else ().
    """

    embedding: nn.Module
    extra: tuple[str, ...] = ()

    def rows(self, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> tuple[Tensor, ...]:
        if position_ids is None or position_ids.ndim != 2:
            raise UnsupportedModelError(
                "the attention layer got no (batch, tokens) position_ids in this forward, but did when it was attached"
            )
        return (position_ids,)

    def cos_sin(self, rows: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor]:
        (positions,) = rows
        if not x.is_cpu or positions.shape[1] <= PIECE or torch.compiler.is_compiling():
            return self._cos_sin(positions, x)
        # Fresh memory for all of it, fp32 on the way, would cost a CPU more than the angles do.
        pieces = positions.split(PIECE, dim=1)
        first = self._cos_sin(pieces[0], x)
        cos, sin = (part.new_empty(part.shape[0], positions.shape[1], part.shape[2]) for part in first)
        for index, piece in enumerate(pieces):
            own = slice(index * PIECE, index * PIECE + piece.shape[1])
            cos[:, own], sin[:, own] = first if index == 0 else self._cos_sin(piece, x)
        return cos, sin

    def _cos_sin(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.embedding(x, positions.to(x.device), *self.extra)


CosSin = StoredCosSin | FixedCosSin  # of the same methods


def find_cos_sin(embeddings: Mapping[nn.Module, Tensor], call: AttentionCall, kind: str | None) -> CosSin:
    """Find the cheapest form that gives back exactly the cos and sin of a call, in every forward.

    Args:
        embeddings: the rotary embeddings that ran in the same forward, and the positions that each was given.
        call: of the attention layer.
        kind: the layer's type in `config.layer_types`, or None.
    """
    if call.position_ids is None or call.position_ids.ndim != 2:
        return StoredCosSin()
    for module, given in embeddings.items():
        # A multimodal embedding reads several rows of positions, alike for text but not for an image, of which the
        # layer is told one.
        if not torch.equal(given, call.position_ids) or not _is_fixed(module, kind):
            continue
        for extra in ((kind,), ()) if kind else ((),):
            rope = FixedCosSin(module, extra)
            try:
                cos, sin = rope.cos_sin((call.position_ids,), call.x)
            except (TypeError, AttributeError, KeyError, ValueError):  # this embedding is called in another way
                continue
            if torch.equal(cos, call.cos) and torch.equal(sin, call.sin):
                return rope
    return StoredCosSin()


def _is_fixed(module: nn.Module, kind: str | None) -> bool:
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):
        rope_type = rope_type.get(kind)
    return rope_type in FIXED_ROPE_TYPES

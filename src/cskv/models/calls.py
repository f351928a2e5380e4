"""The arguments of an attention module's forward, whatever the family names or orders them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from cskv.attention.inputs import Logits
from cskv.errors import UnsupportedModelError
from cskv.models.compat import CACHE_NAMES


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of an attention module that matter to a compressed cache.

    Attributes:
        x: the layer input, (batch, tokens, hidden).
        cos, sin: (batch or 1, tokens, rotary_dim), or None where the layer is given no rotary embedding.
        position_ids: (batch or 1, tokens) or None.
        cache: the model's cache, or None when nothing is cached.
        mask: as the attention function will get it, or None.
    """

    x: Tensor
    cos: Tensor | None
    sin: Tensor | None
    position_ids: Tensor | None
    cache: Cache | None
    mask: Any


class CallReader:
    """Reads the calls of one attention module."""

    def __init__(self, module: nn.Module) -> None:
        self._names = list(inspect.signature(module.forward).parameters)
        self._family = type(module).__name__

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        """Find the arguments by name or position.

        Raises:
            UnsupportedModelError: there is no layer input, or the position embeddings are not (cos, sin).
        """
        given = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        x = given.get("hidden_states")
        if not isinstance(x, Tensor):
            raise UnsupportedModelError(f"{self._family} was called without hidden_states; its input cannot be found")
        cos, sin = self._cos_sin(given.get("position_embeddings"))
        cache = None
        for name in CACHE_NAMES:
            if (cache := given.get(name)) is not None:
                break
        return AttentionCall(x, cos, sin, given.get("position_ids"), cache, given.get("attention_mask"))

    def _cos_sin(self, embeddings: Any) -> tuple[Tensor | None, Tensor | None]:
        if embeddings is None:
            return None, None
        if isinstance(embeddings, (tuple, list)) and len(embeddings) == 2:
            cos, sin = embeddings
            if isinstance(cos, Tensor) and isinstance(sin, Tensor) and not cos.is_complex() and cos.ndim == 3:
                return cos, sin
        raise UnsupportedModelError(
            f"{self._family} gets position embeddings that are not (cos, sin) of (batch, tokens, rotary_dim)"
        )


def logits_of(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any], ignored: frozenset[str]) -> Logits:
    """Read an attention function's arguments as transformers' families pass them, but for what it ignores."""
    scaling = kwargs.get("scaling")
    return Logits(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=None if "softcap" in ignored else kwargs.get("softcap"),
        mask=mask,
        sinks=None if "s_aux" in ignored else kwargs.get("s_aux"),
    )

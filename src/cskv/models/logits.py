"""The rules by which a layer's logits become weights, found by experiment: which arguments its function heeds.

Attention functions take whatever a family passes on: scaling, soft-capping, sinks, and more in families to come. While
the probe's tokens go through the model, every call is repeated by the reference; where that gives the same output, the
arguments are understood, and the same layer may be attended to on its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from cskv.attention import reference
from cskv.errors import CacheError
from cskv.models.attention_interface import Original, Switch, implementation_of
from cskv.models.calls import logits_of
from cskv.models.masks import KNOWN, MaskKind, mask_kind, of_pairs
from cskv.models.recipe import TOLERANCE

PREFIX = "cskv_probe"


@dataclass(frozen=True)
class Understanding:
    """Findings about a layer's attention.

    Attributes:
        ignored: arguments that its function receives but ignores (sdpa and soft-capping, before it refused that).
        why_rebuild: the reason to rebuild old keys and values for it; None where our function can stand in.
    """

    ignored: frozenset[str] = frozenset()
    why_rebuild: str | None = None


@contextmanager
def understanding(modules: list[nn.Module]) -> Iterator[Callable[[nn.Module], Understanding]]:
    """Watch one forward without a past, then answer what is known of a module's attention.

    Old keys and values must be rebuilt where the masks of its attention are of no known kind, where the reference gives
    another output, and where another layer reads this layer's keys and values too.
    """
    ignored: dict[int, frozenset[str] | None] = {}
    readers: dict[int, set[int]] = {}
    held: list[Tensor] = []  # so that no address is used twice
    cuts = any(getattr(module, "is_kv_shared_layer", False) for module in modules)  # Gemma4

    def check(
        original: Original, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        result = original(module, query, key, value, mask, **kwargs)
        held.append(key)
        readers.setdefault(key.data_ptr(), set()).add(id(module))
        kind = mask_kind(implementation_of(module))
        ignored[id(module)] = None if kind is None else _ignored(kind, result[0], query, key, value, mask, kwargs)
        return result

    def understood(module: nn.Module) -> Understanding:
        found, implementation, why = ignored.get(id(module)), implementation_of(module), None
        if (kind := mask_kind(implementation)) is None:
            why = f"its attention is {implementation!r}, none of {KNOWN}"
        elif cuts and kind is MaskKind.BLOCKS:
            why = "layers that read others' keys cut the mask of flex attention, but for its own name"
        elif id(module) not in ignored:
            why = "it does not call transformers' attention interface"
        elif found is None:
            why = "its attention function does more than is understood"
        elif any(len(group) > 1 for group in readers.values() if id(module) in group):
            why = "another layer reads its keys and values too"
        return Understanding(found or frozenset(), why)

    kinds = {None} | ({MaskKind.BLOCKS} if cuts else set())
    switch = Switch(
        modules,
        PREFIX,
        lambda *args, **kwargs: _current[-1](*args, **kwargs),
        only=lambda implementation: mask_kind(implementation) not in kinds,
    )
    _current.append(check)
    try:
        yield understood
    finally:
        _current.pop()
        switch.back()


_current: list[Callable[..., Any]] = []  # registered functions stay; what they do belongs to the forward under way


@torch.no_grad()
def _ignored(
    kind: MaskKind, output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> frozenset[str] | None:
    """Return the arguments that the function ignored, by the reference that comes closest; None if none is close."""
    try:
        mask = of_pairs(mask, kind, query.shape[2], key.shape[2], kwargs.get("sliding_window"))
    except CacheError:
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        return None
    mask = None if mask is None else mask[..., : key.shape[2]]
    given = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    choices = [frozenset(some) for count in range(len(given) + 1) for some in combinations(given, count)]
    errors = {}
    for ignored in choices:
        logits = logits_of(query, mask, kwargs, ignored)
        ours = reference.over(query, key, value, logits).transpose(1, 2)
        if ours.shape != output.shape:
            return None
        errors[ignored] = float((ours.to(output.dtype) - output).abs().max())
    closest = min(choices, key=lambda choice: errors[choice])
    tolerance = TOLERANCE.get(output.dtype, 3e-2) * float(output.abs().max())
    return closest if errors[closest] <= max(tolerance, torch.finfo(torch.float32).tiny) else None

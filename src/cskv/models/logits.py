"""How a layer's logits become weights, found by experiment: what its attention function is told, and what it heeds.

Attention functions take whatever a family passes on: scaling, soft-capping, sinks, and more in families to come. While
the probe's tokens go through the model, every call is repeated by the reference; where that gives the same output, the
arguments are understood, and the same layer may be attended to on its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cskv.attention import reference
from cskv.attention.rules import Logits
from cskv.factorization.factors import Factors, LayerFactors
from cskv.models.interface import Original, Switch
from cskv.view import View

PREFIX = "cskv_probe"
UNDERSTOOD = frozenset({"sdpa", "eager"})  # whose masks are None, or say of every query and key what is read
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
UNUSED = LayerFactors(*(Factors(torch.empty(1, 1), torch.empty(1, 1)) for _ in "kv"))  # nothing is sealed


def logits_of(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Logits:
    """What an attention function is told, as transformers' families say it."""
    scaling = kwargs.get("scaling")
    return Logits(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        mask=mask,
        sinks=kwargs.get("s_aux"),
    )


@contextmanager
def understanding(modules: list[nn.Module]) -> Iterator[Callable[[nn.Module], str | None]]:
    """Watch one forward without a past; then, ask why a module's old keys and values must be rebuilt, if they must.

    They must where its attention is none of `UNDERSTOOD`, where the reference gives another output, and where another
    layer reads this layer's keys and values too.
    """
    agrees: dict[int, bool] = {}
    readers: dict[int, set[int]] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def check(
        original: Original, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        result = original(module, query, key, value, mask, **kwargs)
        held.append(key)
        readers.setdefault(key.data_ptr(), set()).add(id(module))
        agrees[id(module)] = _agrees(result[0], query, key, value, mask, kwargs)
        return result

    def why_rebuild(module: nn.Module) -> str | None:
        if id(module) not in agrees:
            return f"its attention is {module.config._attn_implementation!r}, not {' or '.join(sorted(UNDERSTOOD))}"
        if not agrees[id(module)]:
            return "its attention function does more than is understood"
        shared = any(len(group) > 1 for group in readers.values() if id(module) in group)
        return "another layer reads its keys and values too" if shared else None

    switch = Switch(modules, PREFIX, lambda *args, **kwargs: _current[-1](*args, **kwargs), only=UNDERSTOOD)
    _current.append(check)
    try:
        yield why_rebuild
    finally:
        _current.pop()
        switch.back()


_current: list[Callable[..., Any]] = []  # registered functions stay; what they do belongs to the forward under way


@torch.no_grad()
def _agrees(output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        return False
    mask = None if mask is None else mask[..., : key.shape[2]]
    logits = logits_of(query, mask, kwargs)
    ours = reference.attention(query, View(key, value), UNUSED, None, logits).transpose(1, 2)
    if ours.shape != output.shape:
        return False
    error = (ours.to(output.dtype) - output).abs().max() / output.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return error.item() <= TOLERANCE.get(output.dtype, 3e-2)

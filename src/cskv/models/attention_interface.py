"""Attention functions of our own, in transformers' `AttentionInterface` and `AttentionMaskInterface`.

A function is registered beside each of transformers' own and hands over to it where there is nothing of ours to do. It
gets the same masks: they are made by the original's mask function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Original = Callable[..., Any]  # (module, query, key, value, mask, **kwargs) -> (output, weights or None)
Function = Callable[..., Any]  # (original, module, query, key, value, mask, **kwargs) -> the same
_beside: dict[str, str] = {}  # our registered names -> the implementation that each stands beside


def name_of(prefix: str, implementation: str) -> str:
    """Return the name under which our function is registered beside one of transformers'."""
    # No "sdpa" or "flash" in the name: transformers looks for those substrings.
    return prefix if implementation == "sdpa" else f"{prefix}_{implementation.replace('flash', 'fl')}"


def register(prefix: str, implementation: str, function: Function) -> str:
    """Register a function beside an implementation, once, and return its name."""
    name = name_of(prefix, implementation)
    _beside[name] = implementation
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *dropout: float, **kwargs: Any
        ) -> Any:
            kwargs |= {"dropout": dropout[0]} if dropout else {}  # kvpress, once imported, passes it by position
            return function(original(module, implementation), module, query, key, value, mask, **kwargs)

        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def implementation_of(module: nn.Module) -> str:
    """Return the name of the attention that a module uses, beneath functions of ours."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
    while name in _beside:
        name = _beside[name]
    return name


def original(module: nn.Module, implementation: str) -> Original:
    """Transformers' own function; "eager" is that of the module's file."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    return sys.modules[type(module).__module__].eager_attention_forward


class Switch:
    """Makes the modules of a model use a function of ours, until it is turned back.

    Args:
        modules: attention modules; their configs are switched.
        prefix, function: as for `register`.
        only: the implementations beside which the function works; None for all.
    """

    def __init__(
        self, modules: Iterable[nn.Module], prefix: str, function: Function, only: frozenset[str] | None = None
    ) -> None:
        self._before: list[tuple[Any, str | None, str]] = []
        configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
        for config in configs.values():
            before = config._attn_implementation
            implementation = before or "eager"
            if only is None or implementation in only:
                name = register(prefix, implementation, function)
                config._attn_implementation = name
                self._before.append((config, before, name))

    def back(self) -> None:
        """Give every config its implementation back, unless somebody else has set another since."""
        for config, before, name in self._before:
            if config._attn_implementation == name:
                config._attn_implementation = before
        self._before = []

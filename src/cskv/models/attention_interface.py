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
NAMELESS = frozenset({"sdpa", "eager", "flex_attention"})  # others load a package by the name in the module's config
_beside: dict[str, str] = {}  # our registered names -> the implementation that each stands beside


def name_of(prefix: str, implementation: str) -> str:
    """Return the name under which our function is registered beside one of transformers'."""
    # Transformers looks for "sdpa" in names, and for "/", which is a kernel to load. It looks for "flash" too: whoever
    # asks for that has to treat the model as before, since the masks are those of FlashAttention.
    return prefix if implementation == "sdpa" else f"{prefix}_{implementation.replace('sdpa', 'sd').replace('/', '_')}"


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


def stands_beside(prefix: str, name: str) -> str | None:
    """Return the implementation that a function of this prefix stands beside, by its name; None for other functions."""
    implementation = _beside.get(name)
    return implementation if implementation is not None and name_of(prefix, implementation) == name else None


def original(module: nn.Module, implementation: str) -> Original:
    """Transformers' own function; "eager" is that of the module's file."""
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        return sys.modules[type(module).__module__].eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    if implementation in NAMELESS or implementation in _beside:
        return function

    def by_its_name(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        config = _Changed(module.config, _attn_implementation=implementation)
        return function(_Changed(module, config=config), *args, **kwargs)

    return by_its_name


class _Changed:
    """Stands in for an object, with some attributes of its own."""

    def __init__(self, of: Any, **attributes: Any) -> None:
        self._of = of
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def _set(config: Any, name: str) -> None:
    try:
        config._attn_implementation = name
    except ValueError:  # GPT-OSS of older releases: it takes one FlashAttention, by its name, and that is beneath ours
        config.__dict__["_attn_implementation_internal"] = name


class Switch:
    """Makes the modules of a model use a function of ours, until it is turned back.

    Args:
        modules: attention modules; their configs are switched.
        prefix, function: as for `register`.
        only: whether the function works beside an implementation; None for all.
    """

    def __init__(
        self, modules: Iterable[nn.Module], prefix: str, function: Function, only: Callable[[str], object] | None = None
    ) -> None:
        self._before: list[tuple[Any, str | None, str]] = []
        configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
        for config in configs.values():
            before = config._attn_implementation
            implementation = before or "eager"
            if only is None or only(implementation):
                name = register(prefix, implementation, function)
                _set(config, name)
                self._before.append((config, before, name))

    def back(self) -> None:
        """Give every config its implementation back, unless somebody else has set another since."""
        for config, before, name in self._before:
            if config._attn_implementation == name:
                config._attn_implementation = before
        self._before = []

"""The bytes that an object really holds, whatever its classes: found by walking to its tensors' storages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def allocated_bytes(held: Any) -> int:
    """The bytes of all tensor storages that an object leads to, each counted once.

    Found by walking attributes and containers, whatever the classes: payload, scales, zero points and exact tokens of a
    quantised cache, slack of one that grows ahead. Modules are passed over, since their weights are the model's.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in _tensors(held):
        storage = tensor.untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(root: Any) -> Iterator[Tensor]:
    """The plain tensors that an object leads to."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor) and not hasattr(item, "__tensor_flatten__"):
            yield item
        else:
            stack.extend(_children(item))


def _children(item: Any) -> Iterable[Any]:
    """What an object holds directly."""
    if isinstance(item, Tensor):  # a wrapper: its own storage is a fiction, of the size of the numbers it stands for
        names, _ = item.__tensor_flatten__()  # type: ignore[attr-defined]
        return [getattr(item, name) for name in names]
    if isinstance(item, type | ModuleType | FunctionType | MethodType | nn.Module):
        return ()
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, list | tuple | set | frozenset):
        return item
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(item, name)]
    return [*getattr(item, "__dict__", {}).values(), *(getattr(item, name) for name in slots)]

"""A cache of 8-bit floats: half the bytes, as vLLM's `--kv-cache-dtype fp8` stores keys and values without scales."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from cskv.methods.method import Method, NewCache

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448; larger numbers saturate, as on a GPU


class Fp8Layer(DynamicLayer):
    """A layer that holds float8_e4m3 numbers, and gives all tokens, the newest too, as they are held."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of shape (batch, heads, tokens, head_dim) and return all, in the dtype of these."""
        held = super().update(_stored(key_states), _stored(value_states), *args, **kwargs)
        keys, values = (tensor.to(key_states.dtype) for tensor in held)
        return keys, values


def fp8() -> Method:
    """Return the cache of 8-bit floats as a method. Layers with a sliding window stay as they are."""

    @contextmanager
    def on(model: PreTrainedModel) -> Iterator[NewCache]:
        def new_cache() -> DynamicCache:
            cache = DynamicCache(config=model.config)
            cache.layers = [Fp8Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
            return cache

        yield new_cache

    return Method("fp8", 0.5, on, {"kind": "fp8", "dtype": str(FP8).removeprefix("torch.")})


def _stored(states: Tensor) -> Tensor:
    return states.clamp(-LARGEST, LARGEST).to(FP8)

"""Differences between the supported releases of transformers (5.2 to the newest 5.x)."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

CACHE_NAMES = ("cache", "past_key_values")  # renamed in 5.24


def cache_kwarg(model: nn.Module) -> str:
    """Return the name under which a model's `forward` takes its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def output_cache(outputs: Any) -> Cache | None:
    """Return the cache in a model's or `generate`'s output, or None."""
    return next((outputs[name] for name in CACHE_NAMES if name in outputs), None)

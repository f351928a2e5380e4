"""The bytes that a cache really holds after a prefill, measured from its tensors."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel


def prefill(model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]):
    """Run one forward over the prompt and return (cache, logits of the last position)."""
    raise NotImplementedError


def cache_after_prefill(model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]):
    """The `cskv.CacheReport` of the cache that the prompt leaves: allocated bytes, slack included."""
    raise NotImplementedError

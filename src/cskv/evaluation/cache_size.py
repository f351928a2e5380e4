"""The bytes that a cache really holds after a prefill, measured from its tensors."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from cskv.capture import frozen
from cskv.evaluation.forward import forward
from cskv.models.report import CacheReport, cache_report


def cache_after_prefill(model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]) -> CacheReport:
    """The report of the cache that a prompt leaves behind: allocated bytes, slack included.

    Args:
        model: attached or not.
        input_ids: the prompt; fed in one forward.
    """
    with frozen(model):
        _, cache = forward(model, input_ids, last_only=True)
    return cache_report(cache, model)

"""The bytes that a cache really holds after a prefill, measured from its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cskv.attachment.cache_bytes import CacheReport, cache_report
from cskv.evaluation.forward import forward
from cskv.models.evaluation_mode import evaluation_mode


def cache_after_prefill(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    *,
    new_cache: Callable[[], Cache] | None = None,
    own: CacheReport | None = None,
) -> CacheReport:
    """Return the report of the cache that a prompt leaves behind: allocated bytes, slack included.

    Args:
        model: attached or not.
        input_ids: the prompt; fed in one forward.
        new_cache: makes the empty cache that is filled; the model's own when None. All bytes of one that is not ours
            are `other_bytes`, and `uncompressed_bytes` are those of the model's own.
        own: the report of the model's own, where it is known already; else a second forward makes it.
    """
    with evaluation_mode(model):
        if new_cache is None:
            return cache_report(forward(model, input_ids, last_only=True)[1], model)
        own = own or cache_report(forward(model, input_ids, last_only=True)[1], model)
        _, cache = forward(model, input_ids, new_cache(), last_only=True)
    return replace(cache_report(cache, model), batch=input_ids.shape[0], uncompressed_bytes=own.uncompressed_bytes)

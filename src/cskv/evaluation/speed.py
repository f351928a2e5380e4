"""Decoding speed: greedy tokens per second after a prefill."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from cskv.errors import DataError
from cskv.evaluation.forward import check_least, clock, forward
from cskv.methods.method import NewCache
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of


@dataclass(frozen=True)
class DecodeSpeed:
    """Attributes:
    tokens_per_second: batch rows times steps per second, the median of the repeats.
    low, high: the slowest and the fastest repeat, tokens per second.
    prefill_seconds: of the prompt, once, after a warm-up forward.
    prompt_tokens, batch, steps, repeats: what was measured.
    """

    tokens_per_second: float
    low: float
    high: float
    prefill_seconds: float
    prompt_tokens: int
    batch: int
    steps: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def measure_decode(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    *,
    steps: int = 32,
    repeats: int = 3,
    warmup: int = 4,
    new_cache: NewCache | None = None,
) -> DecodeSpeed:
    """Prefill, decode `warmup` tokens, then time `repeats` stretches of `steps` greedy tokens each.

    The stretches follow one another in one cache, so that a stretch of `config.group` steps contains one sealing.
    `new_cache` makes the empty cache that is filled; the model's own when None.

    Raises:
        DataError: `steps` or `repeats` below 1, `warmup` below 0, or an empty prompt.
    """
    check_least(1, steps=steps, repeats=repeats)
    check_least(0, warmup=warmup)
    batch, prompt_tokens = input_ids.shape
    if not batch * prompt_tokens:
        raise DataError(f"the prompt has shape {tuple(input_ids.shape)}; expected at least one row and one token")
    device = device_of(model)
    with evaluation_mode(model):
        forward(model, input_ids[:, :8])
        began = clock(device)
        logits, cache = forward(model, input_ids, None if new_cache is None else new_cache(), last_only=True)
        seconds = [clock(device) - began]
        for number in (warmup, *[steps] * repeats):
            began = clock(device)
            for _ in range(number):
                logits, cache = forward(model, logits.argmax(-1), cache, last_only=True)
            seconds.append(clock(device) - began)
    prefill_seconds, _, *stretches = seconds
    speeds = [batch * steps / stretch for stretch in stretches]
    return DecodeSpeed(
        tokens_per_second=statistics.median(speeds),
        low=min(speeds),
        high=max(speeds),
        prefill_seconds=prefill_seconds,
        prompt_tokens=prompt_tokens,
        batch=batch,
        steps=steps,
        repeats=repeats,
    )

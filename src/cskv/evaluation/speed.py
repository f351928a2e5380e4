"""Decoding speed: greedy tokens per second after a prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel


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
        """The fields as JSON-ready values."""
        raise NotImplementedError


def measure_decode(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], *, steps: int = 32, repeats: int = 3
) -> DecodeSpeed:
    """Prefill, decode one warm-up stretch, then time `repeats` stretches of `steps` greedy tokens each.

    The stretches follow one another in one cache, so that a stretch of `config.group` steps contains one sealing.

    Raises:
        DataError: `steps` or `repeats` below 1, or an empty prompt.
    """
    raise NotImplementedError

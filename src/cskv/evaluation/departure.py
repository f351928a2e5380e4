"""Long greedy generation: after how many tokens a method's own text departs from the uncompressed model's.

Both continue the same beginning of a text, which is prefilled at once, and each reads back what it has generated from
its own cache. End-of-sequence is never chosen, so that all texts have the same length. From the first token that
differs on, the two go on from different texts, so counting ends there; texts that never differ are censored at the
length that was asked for. In half precision near ties fall either way by rounding alone, also at full rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cskv.evaluation.agreement import bootstrap_interval
from cskv.evaluation.decoding import end_ids
from cskv.evaluation.forward import check_least, forward
from cskv.evaluation.wilson import wilson_interval
from cskv.methods.method import Method
from cskv.models.evaluation_mode import evaluation_mode

OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class Departures:
    """How long a method's texts are the uncompressed model's.

    Attributes:
        generated: tokens of each text.
        equal: equal tokens before the first that differs, of each text; `generated` where none does.
        texts: token ids of each text, generated until all of its batch had departed.
    """

    generated: int
    equal: tuple[int, ...]
    texts: tuple[Int[Tensor, " made"], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return mean, median and the share that is equal to the end, with 95 % intervals, as JSON-ready values.

        The mean's interval is a bootstrap over texts (null of a single text), the share's is Wilson's.
        """
        whole = sum(count == self.generated for count in self.equal)
        interval = bootstrap_interval(self.equal)
        return {
            "n": len(self.equal),
            "generated": self.generated,
            "equal_tokens": list(self.equal),
            "mean_equal": fmean(self.equal),
            "mean_equal_interval": interval and list(interval),
            "median_equal": float(median(self.equal)),
            "still_equal": whole / len(self.equal),
            "still_equal_interval": list(wilson_interval(whole, len(self.equal))),
        }


def reference_texts(
    model: PreTrainedModel,
    prompts: Int[Tensor, "texts tokens"],
    generated: int,
    *,
    batch_size: int = 1,
    on_tokens: OnTokens | None = None,
) -> Int[Tensor, "texts generated"]:
    """Return what the bare model itself generates after each prompt, greedily.

    Raises:
        DataError: a number below 1.
    """
    check_least(1, generated=generated, batch_size=batch_size)
    with evaluation_mode(model):
        return torch.cat([_greedy(model, rows, generated, on_tokens=on_tokens) for rows in prompts.split(batch_size)])


def departures(
    model: PreTrainedModel,
    method: Method,
    prompts: Int[Tensor, "texts tokens"],
    reference: Int[Tensor, "texts generated"],
    *,
    batch_size: int = 1,
    on_tokens: OnTokens | None = None,
) -> Departures:
    """Generate with a method, and compare with the uncompressed model's texts.

    Args:
        model: the bare model.
        method: what its cache is compressed by.
        prompts: token ids, all of one length, so that rows need no padding.
        reference: from `reference_texts`, with the same batch size: in half precision sums of other batches differ.
        batch_size: rows generated together, until the last of them has departed.
        on_tokens: called with the number of tokens just generated, for a progress bar.

    Raises:
        DataError: a batch size below 1.
    """
    check_least(1, batch_size=batch_size)
    equal: list[int] = []
    texts: list[Tensor] = []
    with evaluation_mode(model), method.on(model) as new_cache:
        for rows, expected in zip(prompts.split(batch_size), reference.split(batch_size), strict=True):
            cache = None if new_cache is None else new_cache()
            made = _greedy(model, rows, reference.shape[1], cache, expected, on_tokens)
            same = made == expected[:, : made.shape[1]]
            equal += same.long().cumprod(dim=1).sum(dim=1).tolist()
            texts += list(made)
    return Departures(reference.shape[1], tuple(equal), tuple(texts))


def _greedy(
    model: PreTrainedModel,
    rows: Int[Tensor, "batch tokens"],
    count: int,
    cache: Cache | None = None,
    expected: Int[Tensor, "batch count"] | None = None,
    on_tokens: OnTokens | None = None,
) -> Int[Tensor, "batch made"]:
    """Generate `count` tokens after each row, or fewer once every row differs from what is expected."""
    ends = end_ids(model)
    made: list[Tensor] = []
    piece, seen = rows, 0
    departed = torch.zeros(len(rows), dtype=torch.bool)
    while len(made) < count and not bool(departed.all()):
        logits, cache = forward(model, piece, cache, last_only=True, seen=seen)
        seen += piece.shape[1]
        logits[..., ends] = -torch.inf
        piece = logits.argmax(-1).cpu()
        made.append(piece)
        if expected is not None:
            departed |= piece[:, 0] != expected[:, len(made) - 1]
        if on_tokens is not None:
            on_tokens(len(rows))
    return torch.cat(made, dim=1)


def decoded(tokenizer: Any, found: Departures, reference: Int[Tensor, "texts generated"]) -> list[dict[str, Any]]:
    """Return both texts of every prompt, as long as the method's was generated, for a person to compare."""
    return [
        {"equal": equal, "output": tokenizer.decode(text), "reference": tokenizer.decode(row[: len(text)])}
        for equal, text, row in zip(found.equal, found.texts, reference, strict=True)
    ]

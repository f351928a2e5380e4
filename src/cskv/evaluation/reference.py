"""What the uncompressed model predicts of texts, made once for all methods that are measured on them.

Kept are last hidden states, which are a hundred times smaller than logits; these are made anew of a few positions at a
time.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from cskv.errors import UnsupportedModelError
from cskv.evaluation.forward import forward, pieces
from cskv.models.compat import cache_kwarg, output_cache
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of
from cskv.models.survey import Survey, survey
from cskv.reading.compressed import check_readable
from cskv.reading.head import Head

HELD = 2**30  # bytes of hidden states
WHOLE = 4096  # tokens of a forward: longer texts are read through a cache


class Reference:
    """A model without a method, and its predictions.

    Args:
        model: the bare model.

    Attributes:
        surveyed: the model.
        head: makes logits of `states`.
        reads_whole: whether methods can read texts in one forward without a cache (`cskv.reading`): the model's
            attention and head are understood.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.surveyed: Survey = survey(model)
        try:
            self.head: Head | None = Head(model)
        except UnsupportedModelError:  # then the logits themselves are kept
            self.head = None
        self.reads_whole = self.head is not None and _is_readable(self.surveyed)
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def states(self, rows: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens channels"]:
        """Return what `logits` reads of texts, kept from an earlier call where there was one."""
        texts = [tuple(row) for row in rows.tolist()]
        if any(text not in self._kept for text in texts):
            self._kept |= dict(zip(texts, self._read(rows), strict=True))
        found = torch.stack([self._kept[text] for text in texts])
        self._forget()
        return found

    def logits(self, states: Float[Tensor, "batch some channels"]) -> Float[Tensor, "batch some vocabulary"]:
        """Return the logits of some positions, in fp32."""
        return (states if self.head is None else self.head(states)).float()

    @torch.no_grad()
    def _read(self, rows: Tensor) -> Tensor:
        parts, cache = [], None
        with evaluation_mode(self._model):
            for start, stop in pieces(rows.shape[1], WHOLE, WHOLE):
                if self.head is None:
                    states, cache = forward(self._model, rows[:, start:stop], cache, seen=start)
                else:
                    decoder: Any = self._model.base_model
                    ids = rows[:, start:stop].to(device_of(self._model))
                    outputs = decoder(input_ids=ids, use_cache=True, **{cache_kwarg(decoder): cache})
                    states, cache = outputs[0], output_cache(outputs)
                parts.append(states)
        return torch.cat(parts, dim=1)

    def _forget(self) -> None:
        """Drop the oldest texts where there are too many bytes of them."""
        held = sum(states.nbytes for states in self._kept.values())
        for text in list(self._kept):
            if held <= HELD:
                break
            held -= self._kept.pop(text).nbytes


def _is_readable(surveyed: Survey) -> bool:
    try:
        check_readable(surveyed)
        return all(recipe.attention.why_rebuild is None for recipe in surveyed.recipes.values())
    except UnsupportedModelError:
        return False

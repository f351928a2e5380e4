"""The language-model head by itself, so that logits are made of some positions at a time: they are large."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cskv.errors import UnsupportedModelError
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of

TOLERANCE = 1e-3  # of the head's logits, relative to the model's largest


class Head:
    """Computes logits from hidden states as the model itself does: families scale or soft-cap what their head puts out.

    Args:
        model: a decoder model with a language-model head.

    Raises:
        UnsupportedModelError: the model has no head, or does more with its logits than is understood.
    """

    def __init__(self, model: nn.Module) -> None:
        linear = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(linear, nn.Module):
            raise UnsupportedModelError(f"{type(model).__name__} has no language-model head; load it as a causal LM")
        self._linear = linear
        config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._check(model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the (..., vocab) logits of (..., hidden) last hidden states, final norm included."""
        logits = self._linear(hidden)
        if self._scale != 1:
            logits = logits * self._scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @torch.no_grad()
    def _check(self, model: nn.Module) -> None:
        weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        tokens = (torch.arange(1, 5, device=device_of(model)) % weight.shape[0])[None]
        with evaluation_mode(model):
            exact = model(tokens, use_cache=False).logits.float()
            ours = self(model.base_model(input_ids=tokens, use_cache=False)[0]).float()  # type: ignore[operator]
        if (ours - exact).abs().max() > TOLERANCE * exact.abs().max():
            raise UnsupportedModelError(f"{type(model).__name__} does more to its logits than scale and soft-cap them")

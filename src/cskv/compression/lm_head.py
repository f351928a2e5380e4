"""A model's logits from its last hidden states, a few positions at a time.

The logits of a long text over a large vocabulary are the largest tensor of a forward. Families scale or soft-cap what
their head puts out; which of it a model does is checked against its own logits once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cskv.errors import UnsupportedModelError
from cskv.models.evaluation_mode import evaluation_mode

TOLERANCE = 1e-3  # relative to the largest logit


class Head:
    """Computes logits from hidden states as the model itself does.

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
        cap, scale, divisor = (
            getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        )
        self._changes: list[Callable[[Tensor], Tensor]] = []
        if scale is not None:
            self._changes.append(lambda logits: logits * scale)
        if divisor is not None:
            self._changes.append(lambda logits: logits / divisor)
        if cap is not None:
            self._changes.append(lambda logits: torch.tanh(logits / cap) * cap)
        self._check(model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the (..., vocab) logits of (..., hidden) last hidden states, final norm included."""
        logits = self._linear(hidden)
        for change in self._changes:
            logits = change(logits)
        return logits

    @torch.no_grad()
    def _check(self, model: nn.Module) -> None:
        weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        tokens = (torch.arange(1, 5, device=weight.device) % weight.shape[0])[None]
        with evaluation_mode(model):
            exact = model(tokens, use_cache=False).logits.float()
            ours = self(model.base_model(input_ids=tokens, use_cache=False)[0]).float()  # type: ignore[operator]
        if (ours - exact).abs().max() > TOLERANCE * exact.abs().max():
            raise UnsupportedModelError(f"{type(model).__name__} does more to its logits than scale and soft-cap them")

"""KL divergence per token of a compressed model's predictions from the model's own, by one forward for a whole text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import device_of
from cskv.compression.reading import Part, check_readable, compressed_reading
from cskv.errors import UnsupportedModelError
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.survey import Survey

CHUNK = 256  # positions whose logits exist at the same time: those of a long text are the largest tensor of a forward
TOLERANCE = 1e-3  # of the head's logits, relative to the model's largest


class Divergence:
    """KL(uncompressed || compressed) of next-token distributions, old tokens read compressed and the window exactly.

    Args:
        surveyed: a decoder model with a language-model head.

    Raises:
        UnsupportedModelError: the model's attention or head is not understood.
    """

    def __init__(self, surveyed: Survey) -> None:
        check_readable(surveyed)
        self.surveyed, self.model = surveyed, surveyed.model
        self.head = Head(surveyed.model)

    def kl(
        self,
        adapter: CSKVAdapter,
        input_ids: Int[Tensor, "batch tokens"],
        *,
        exact: Float[Tensor, "batch tokens hidden"] | None = None,
        only: frozenset[Part] | None = None,
        checkpointed: bool = False,
    ) -> Float[Tensor, ""]:
        """Return the mean over tokens, in nats; gradients reach the adapter's factors.

        Args:
            adapter: made for the model.
            input_ids: whole texts without padding.
            exact: from `exact_hidden`, to save a forward.
            only: the parts that are compressed; None compresses all.
            checkpointed: run every layer a second time in the backward pass, rather than keep its activations.
        """
        exact = self.exact_hidden(input_ids) if exact is None else exact
        reading = compressed_reading(self.surveyed, adapter, only=only, checkpointed=checkpointed)
        with evaluation_mode(self.model), reading:
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False)[0]  # type: ignore[operator]
        total = torch.zeros((), device=hidden.device)
        for ours, theirs in zip(hidden.split(CHUNK, dim=1), exact.split(CHUNK, dim=1), strict=True):
            # Recomputed in the backward pass: only one chunk's logits are ever held.
            total = total + checkpoint(self._chunk, ours, theirs, use_reentrant=False)
        return total / input_ids.numel()

    @torch.no_grad()
    def exact_hidden(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return the unpatched model's last hidden states."""
        with evaluation_mode(self.model):
            return self.model.base_model(input_ids=input_ids, use_cache=False)[0]  # type: ignore[operator]

    def exact(self, samples: Iterable[Int[Tensor, " tokens"]]) -> list[Float[Tensor, "1 tokens hidden"]]:
        """Return `exact_hidden` of every sample, for `mean`, when several adapters are compared on the same samples."""
        return [self.exact_hidden(sample.to(device_of(self.model))[None]) for sample in samples]

    @torch.no_grad()
    def mean(
        self,
        adapter: CSKVAdapter,
        samples: Iterable[Int[Tensor, " tokens"]],
        only: frozenset[Part] | None = None,
        exact: Sequence[Float[Tensor, "1 tokens hidden"]] | None = None,
    ) -> float:
        """Return the mean over samples; `exact` saves a forward of each."""
        device = device_of(self.model)
        values = [
            self.kl(adapter, sample.to(device)[None], only=only, exact=None if exact is None else exact[i]).item()
            for i, sample in enumerate(samples)
        ]
        return sum(values) / len(values)

    def _chunk(self, hidden: Tensor, exact: Tensor) -> Tensor:
        ours = torch.log_softmax(self.head(hidden).float(), dim=-1)
        theirs = torch.log_softmax(self.head(exact).float(), dim=-1)
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")


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
        tokens = (torch.arange(1, 5, device=weight.device) % weight.shape[0])[None]
        with evaluation_mode(model):
            exact = model(tokens, use_cache=False).logits.float()
            ours = self(model.base_model(input_ids=tokens, use_cache=False)[0]).float()  # type: ignore[operator]
        if (ours - exact).abs().max() > TOLERANCE * exact.abs().max():
            raise UnsupportedModelError(f"{type(model).__name__} does more to its logits than scale and soft-cap them")

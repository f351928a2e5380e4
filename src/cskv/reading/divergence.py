"""KL divergence per token of a compressed model's predictions from the model's own, by one forward for a whole text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cskv.adapter.adapter import CSKVAdapter
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of
from cskv.models.survey import Survey
from cskv.reading.compressed import OldTokens, check_readable, compressed_reading
from cskv.reading.head import Head

CHUNK = 256  # positions whose logits exist at the same time: those of a long text are the largest tensor of a forward


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
        adapter: CSKVAdapter | OldTokens,
        input_ids: Int[Tensor, "batch tokens"],
        *,
        exact: Float[Tensor, "batch tokens hidden"] | None = None,
        checkpointed: bool = False,
    ) -> Float[Tensor, ""]:
        """Return the mean over tokens, in nats; gradients reach the adapter's factors.

        Args:
            adapter: made for the model; or what else is read in place of old tokens.
            input_ids: whole texts without padding.
            exact: from `exact_hidden`, to save a forward.
            checkpointed: run every layer a second time in the backward pass, rather than keep its activations.
        """
        exact = self.exact_hidden(input_ids) if exact is None else exact
        reading = compressed_reading(self.surveyed, adapter, checkpointed=checkpointed)
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
        exact: Sequence[Float[Tensor, "1 tokens hidden"]] | None = None,
    ) -> float:
        """Return the mean over samples; `exact` saves a forward of each."""
        device = device_of(self.model)
        values = [
            self.kl(adapter, sample.to(device)[None], exact=None if exact is None else exact[i]).item()
            for i, sample in enumerate(samples)
        ]
        return sum(values) / len(values)

    def _chunk(self, hidden: Tensor, exact: Tensor) -> Tensor:
        ours = torch.log_softmax(self.head(hidden).float(), dim=-1)
        theirs = torch.log_softmax(self.head(exact).float(), dim=-1)
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")

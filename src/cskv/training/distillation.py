"""End-to-end training: the compressed model is to predict what the uncompressed one predicts.

Reconstruction counts every channel alike, and its minimum has a closed form. What is wanted is the model's output.
Here the loss is the KL divergence of the next-token distributions over whole texts, old tokens read compressed and the
window exactly, in one differentiable forward (`cskv.compression.reading`). Start it from PCA factors. It keeps the
activations of the whole model for the backward pass, so it needs the memory of fine-tuning with a frozen base, or with
gradient checkpointing those of one layer; logits are made a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import device_of
from cskv.compression.divergence import Divergence
from cskv.models.survey import survey


class WholeTexts:
    """The input of distillation: the token ids themselves. The counterpart of `Teacher`.

    Args:
        model: the base model, with its language-model head.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the weights of the base from collecting gradients inside the block."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def observe(self, input_ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """Return the tokens on the device where the model takes them."""
        return input_ids.to(device_of(self.model))


class Distillation(nn.Module):
    """The compressor as a module from token ids to its loss, so that DistributedDataParallel can wrap it.

    Args:
        model: the base model; no submodule of this one, so that its weights are not trained.
        adapter: its factors are the parameters; fp32.
        checkpointed: whether the backward pass runs every layer again instead of keeping its activations.
    """

    parts = ("loss",)

    def __init__(self, model: nn.Module, adapter: CSKVAdapter, *, checkpointed: bool = False) -> None:
        super().__init__()
        self._checkpointed = checkpointed
        self.adapter = adapter
        self._divergence = Divergence(survey(model))

    def forward(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, " 1"]:
        """Return KL(uncompressed || compressed), in nats per token."""
        return self._divergence.kl(self.adapter, input_ids, checkpointed=self._checkpointed)[None]

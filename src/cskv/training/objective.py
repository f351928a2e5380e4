"""The objectives of training: layer-wise reconstruction, the paper's, and end-to-end distillation.

Reconstruction minimises the sum over layers of MSE(K, K^) + MSE(V, V^). Keys are compared as the projection makes them,
before any norm and RoPE. RoPE is orthogonal, so the paper's loss on rotated keys is the same number. Where latents are
stored in few bits, what is compared is rebuilt from what the cache would read of them (quantisation-aware training,
section 3.3). Layer inputs come from the frozen model, so no layer's factors influence another's loss.

Reconstruction counts every channel alike, and its minimum has a closed form, PCA of keys and values, which training
from SVD or ASVD approaches step by step, as in the paper. What is wanted is the model's output. Distillation minimises
the KL divergence of the next-token distributions over whole texts, old tokens read compressed and the window exactly,
in one differentiable forward (`cskv.reading.compressed`). Start it from PCA factors. It keeps the activations of the
whole model for the backward pass, so it needs the memory of fine-tuning with a frozen base, or with gradient
checkpointing those of one layer; logits are made a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import Observation
from cskv.factorization.factors import Factors
from cskv.models.evaluation_mode import frozen
from cskv.models.placement import device_of
from cskv.models.survey import Survey
from cskv.quantization.fake import read_back
from cskv.quantization.grid import Grid
from cskv.reading.divergence import Divergence


class Reconstruction(nn.Module):
    """The compressor as a module from observations to losses, so that DistributedDataParallel can wrap it.

    Args:
        adapter: its factors are the parameters; fp32.
        bf16: compute the products in bf16, the losses in fp32.
    """

    parts = ("k_loss", "v_loss")

    def __init__(self, adapter: CSKVAdapter, bf16: bool = False) -> None:
        super().__init__()
        self.adapter = adapter
        self.bf16 = bf16

    def forward(self, observations: Mapping[int, Observation]) -> Float[Tensor, " 2"]:
        """Return the key and the value loss, summed over layers; each layer's is a mean over tokens and channels."""
        losses = []
        for layer_idx, (x, k, v) in observations.items():
            factors, (k_grid, v_grid) = self.adapter.factors(layer_idx), self.adapter.grids(layer_idx)
            losses += [self._loss(factors.k, k_grid, x, k), self._loss(factors.v, v_grid, x, v)]
        return torch.stack(losses).view(-1, 2).sum(0)

    def _loss(self, factors: Factors, grid: Grid | None, x: Tensor, exact: Tensor) -> Float[Tensor, ""]:
        device = factors.down.device  # a base spread over several devices keeps its factors on one
        # Plain autocast instead of Accelerate's: that one is fixed per process by whoever made the first Accelerator.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            rebuilt = factors.expand(read_back(factors.latents(x.to(device, torch.float32)), grid))
        return mse_loss(rebuilt.float(), exact.to(device, torch.float32))


class Distillation(nn.Module):
    """The compressor as a module from token ids to its loss, so that DistributedDataParallel can wrap it.

    It is its own teacher: what it observes are the tokens.

    Args:
        base: the base model, with its language-model head; no submodule of this one, so that its weights are not
            trained.
        adapter: its factors are the parameters; fp32.
        checkpointed: whether the backward pass runs every layer again instead of keeping its activations.
    """

    parts = ("loss",)

    def __init__(self, base: Survey, adapter: CSKVAdapter, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.adapter = adapter
        self._base, self._checkpointed = base, checkpointed
        self._divergence = Divergence(base)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the weights of the base from collecting gradients inside the block."""
        with frozen(self._base.model):
            yield

    def observe(self, input_ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """Return the tokens on the device where the model takes them."""
        return input_ids.to(device_of(self._base.model))

    def forward(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, " 1"]:
        """Return KL(uncompressed || compressed), in nats per token."""
        return self._divergence.kl(self.adapter, input_ids, checkpointed=self._checkpointed)[None]

"""The layer-wise reconstruction loss: sum over layers of MSE(K, K^) + MSE(V, V^).

Keys are compared as the projection makes them, before any norm and RoPE. RoPE is orthogonal, so the paper's loss on
rotated keys is the same number. Where latents are stored in few bits, what is compared is rebuilt from what the cache
would read of them (quantisation-aware training, section 3.3). Layer inputs come from the frozen model, so no layer's
factors influence another's loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import Observation
from cskv.factorization.factors import Factors
from cskv.quantization.fake import read_back
from cskv.quantization.grid import Grid


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
        k_losses, v_losses = [], []
        for layer_idx, (x, k, v) in observations.items():
            factors = self.adapter.factors(layer_idx)
            k_grid, v_grid = self.adapter.grids(layer_idx)
            k_losses.append(self._loss(factors.k, k_grid, x, k))
            v_losses.append(self._loss(factors.v, v_grid, x, v))
        return torch.stack([torch.stack(k_losses).sum(), torch.stack(v_losses).sum()])

    def _loss(self, factors: Factors, grid: Grid | None, x: Tensor, exact: Tensor) -> Float[Tensor, ""]:
        device = factors.down.device  # a base spread over several devices keeps its factors on one
        # Plain autocast instead of Accelerate's: that one is fixed per process by whoever made the first Accelerator.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            rebuilt = factors.expand(read_back(factors.latents(x.to(device, torch.float32)), grid))
        return mse_loss(rebuilt.float(), exact.to(device, torch.float32))

"""The rows of a linear layer that make queries, keys or values, whatever its weight is stored as.

A layer may be packed (bitsandbytes, HQQ, quanto, torchao), offloaded by accelerate, or carry an unmerged LoRA. What it
multiplies by is then not its `weight`, so it is read through the layer's own forward, from the rows of the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cskv.errors import UnsupportedModelError
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of, plain_arithmetic

CHUNK = 256  # rows of the identity that go through a layer at a time
NONLINEAR = 0.1  # of the largest output: activations in 8 bits are off by some hundredths


@dataclass(frozen=True)
class Projection:
    """A range of a linear layer's output channels.

    Attributes:
        linear: the module whose output holds the channels.
        start, stop: the channels of the module's output that are ours.
        dtype: of the hidden states that it reads.
    """

    linear: nn.Module
    start: int
    stop: int
    dtype: torch.dtype

    @property
    def kv_dim(self) -> int:
        return self.stop - self.start

    @property
    def in_features(self) -> int:
        """Channels that the layer reads."""
        return features_of(self.linear)[0]

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return device_of(self.linear)

    @property
    def weight(self) -> Float[Tensor, "kv_dim hidden"]:
        """The matrix that the layer multiplies by: a view of its weight where it is stored so, else read anew, in fp32.

        Raises:
            UnsupportedModelError: the layer's weights are on no device, or it is not linear.
        """
        if _is_plain(self.linear):
            return self.linear.weight[self.start : self.stop]
        hidden, device = self.in_features, self.device
        with plain_arithmetic(device), evaluation_mode(self.linear), _without_bias(self.linear):
            constant = self._output(torch.zeros(1, hidden, device=device))
            chunks = (nn.functional.one_hot(rows, hidden) for rows in torch.arange(hidden, device=device).split(CHUNK))
            weight = torch.cat([self._output(chunk) - constant for chunk in chunks]).T.contiguous()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(8, hidden, generator=generator).to(device, self.dtype)
            expected, found = x.float() @ weight.T, self._output(x) - constant
            if not float((found - expected).abs().max()) <= NONLINEAR * float(expected.abs().max()):
                raise UnsupportedModelError(
                    f"{type(self.linear).__name__} is no linear map of its input; keys and values cannot be factorised"
                )
        return weight

    @property
    def bias(self) -> Float[Tensor, " kv_dim"] | None:
        """The vector that the layer adds, or None: a view of its bias where its weight is one, else in fp32."""
        if _is_plain(self.linear):
            return None if self.linear.bias is None else self.linear.bias[self.start : self.stop]
        with plain_arithmetic(self.device), evaluation_mode(self.linear):
            constant = self._output(torch.zeros(1, self.in_features, device=self.device))[0]
        return constant if constant.any() else None

    def select(self, output: Tensor) -> Tensor:
        """Take our channels of the module's output, (..., kv_dim)."""
        return output[..., self.start : self.stop]

    def _output(self, x: Tensor) -> Tensor:
        return self.select(self.linear(x[None].to(self.dtype)))[0].float()


def features_of(linear: nn.Module) -> tuple[int, int]:
    """Return the channels that a linear layer reads, and those that it makes.

    Raises:
        UnsupportedModelError: the layer does not tell them.
    """
    weight = getattr(linear, "weight", None)
    told = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    if not _is_plain(linear) and isinstance(told[0], int) and isinstance(told[1], int):
        return told[0], told[1]
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2:
        return weight.shape[1], weight.shape[0]
    raise UnsupportedModelError(f"{type(linear).__name__} does not tell its in_features and out_features")


def _is_plain(linear: nn.Module) -> bool:
    """Return whether a layer multiplies by its `weight` as it stands."""
    weight = getattr(linear, "weight", None)
    own_forward = type(linear).forward is nn.Linear.forward and "forward" not in vars(linear)
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    stored = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    return own_forward and stored and not hooked


@contextmanager
def _without_bias(linear: nn.Module) -> Iterator[None]:
    """Take the biases off for a while: beside one in the hundreds, low precision would lose the weight."""
    parts = linear.modules()
    stores: list[dict[str, Any]] = [held for part in parts for held in (part._parameters, part._buffers, vars(part))]
    taken = [(held, held["bias"]) for held in stores if isinstance(held.get("bias"), Tensor)]
    for held, _ in taken:
        held["bias"] = None
    try:
        yield
    finally:
        for held, bias in taken:
            held["bias"] = bias

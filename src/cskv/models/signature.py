"""The signature of a model's key and value weights (`cskv.adapter.base_model.Signature`), taken by running them.

A projection of any kind is a linear map that can be run: packed in few bits, under a live LoRA, or offloaded by
Accelerate. So its own forward is applied to fixed vectors, and their opposites, which takes its bias off. Where there
is no model but its files, the weights are read from there.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from cskv.adapter.base_model import LayerShape, Signature
from cskv.errors import CSKVError, UnsupportedModelError
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import plain_arithmetic
from cskv.models.projection import Projection
from cskv.models.sites import AttentionSite

IN_FILES = re.compile(r"^(?!.*(vision|visual|audio)).*\.(?P<layer>\d+)\.self_attn\.(?P<kind>k|v|qkv)_proj\.weight$")
NUMBERS = 4  # of every projection
SCALE = 64.0  # of the vectors: what a bias of hundreds leaves of the products in bf16 must not be rounding


@torch.no_grad()
def take_signature(model: nn.Module, sites: Sequence[AttentionSite]) -> Signature | None:
    """Run every key and value projection once.

    Returns:
        None where weights are not finite, and after a warning where some are on the meta device and nothing brings
        them from there.
    """
    layers = {}
    with evaluation_mode(model):
        for site in sites:
            found = {"k": _numbers(site.k), "v": _numbers(site.v)}
            if not (found["k"] and found["v"]):
                warnings.warn(
                    f"the key and value weights of {site.name} are not at hand: whether an adapter or statistics "
                    "belong to them is not checked",
                    stacklevel=4,
                )
                return None
            if not all(map(math.isfinite, found["k"] + found["v"])):
                return None
            layers[str(site.layer_idx)] = found
    return Signature(any(_is_packed(part.linear) for site in sites for part in (site.k, site.v)), layers)


def read_signature(files: Sequence[Path], sites: Sequence[LayerShape]) -> Signature | None:
    """Take the signature of a model from its safetensors.

    Returns:
        None where the weights of some layer are packed, or have names or shapes of another kind.

    Raises:
        CSKVError: a file is damaged.
    """
    shapes, layers = {site.layer_idx: site for site in sites}, dict[str, dict[str, list[float]]]()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    if (match := IN_FILES.search(name)) and (site := shapes.get(int(match["layer"]))):
                        parts = _parts(tensors.get_tensor(name), match["kind"], site)
                        layers.setdefault(match["layer"], {}).update(parts)
        except SafetensorError as error:
            raise CSKVError(f"{file} is truncated or corrupted ({error}); copy or download the model again") from error
    whole = len(layers) == len(shapes) and all(len(kinds) == 2 for kinds in layers.values())
    return Signature(False, layers) if whole else None


def _parts(weight: Tensor, kind: str, site: LayerShape) -> dict[str, list[float]]:
    """Return the numbers of a key or value weight, or of those at the end of a fused one."""
    rows = {"k": slice(None), "v": slice(None)}
    if kind == "qkv":
        rows = {"k": slice(-2 * site.kv_dim, -site.kv_dim), "v": slice(-site.kv_dim, None)}
    wanted = {name: weight[rows[name]] for name in kind if name != "q"}
    fits = all(part.shape == (site.kv_dim, site.hidden_size) for part in wanted.values())
    if not (fits and weight.is_floating_point() and weight.itemsize > 1):
        return {}
    inputs = _signs("r", site.hidden_size)
    return {name: _contracted(linear(inputs.to(part), part)) for name, part in wanted.items()}


def _numbers(projection: Projection) -> list[float]:
    """Return s^T W r for pairs of vectors, to 5 digits; none where there is nothing to run."""
    try:
        device, inputs = projection.device, _signs("r", projection.in_features) * SCALE
    except UnsupportedModelError:
        return []
    with plain_arithmetic(device):
        both = torch.cat([inputs, -inputs])[None].to(device, projection.dtype)
        plus, minus = projection.select(projection.linear(both))[0].float().chunk(2)
    return _contracted((plus - minus) / (2 * SCALE))


def _contracted(outputs: Tensor) -> list[float]:
    sums = (outputs.double().cpu() * _signs("s", outputs.shape[-1])).sum(-1)
    return [float(f"{value:.5g}") for value in sums.tolist()]


def _is_packed(module: nn.Module) -> bool:
    """Return whether a projection's weights are anything but numbers of 16 bits or more."""
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor
    return not (plain and weight.is_floating_point() and weight.itemsize > 1)  # type: ignore[union-attr]


@cache
def _signs(role: str, size: int) -> Tensor:
    """Return fixed (NUMBERS, size) vectors of +1 and -1, the same in every release of torch and numpy."""
    stream = hashlib.shake_256(f"cskv signature {role} {size}".encode()).digest(-(-NUMBERS * size // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[: NUMBERS * size]
    return torch.from_numpy(bits.reshape(NUMBERS, size).astype(np.float32)) * 2 - 1

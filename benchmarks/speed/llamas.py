"""Random Llamas of known shapes, random factors for them, and caches that are filled without a real prefill.

Speed depends on shapes, not on what the numbers are. So attention and the MLPs are left out of the forwards that fill a
cache, and tokens come to it as ever: keys, values and latents of what is random, of the right sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import cskv
from benchmarks.speed.generation import commuting_factors
from benchmarks.speed.problem import llama
from cskv.models.compat import cache_kwarg
from cskv.models.survey import survey

DENSITY = 192 / 1024  # whole blocks of 8 latents, in 8 groups too
PIECE = 16_384  # tokens of a prompt that are read at a time


@dataclass(frozen=True)
class Size:
    """The shape of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int = 32_000

    def model(self, device: str) -> LlamaForCausalLM:
        """Make the model with random weights in bf16, where it is to run."""
        torch.manual_seed(0)
        others = {"intermediate_size": self.mlp, "vocab_size": self.vocabulary}
        config = llama(self.heads, self.kv_heads, self.head_dim, num_hidden_layers=self.layers, **others)
        config.hidden_size, config._attn_implementation = self.hidden, "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


SIZES = {"8B": Size(4096, 32, 32, 8, 128, 14_336), "1B": Size(2048, 16, 32, 8, 64, 8192)}
TINY = {"tiny": Size(64, 2, 8, 8, 16, 64, 128)}


def adapter(model: nn.Module, settings: Mapping[str, Any]) -> cskv.CSKVAdapter:
    """Make random factors of the ranks that the settings ask for, the same in all layers but for what they read."""
    found, layers = survey(model), {}
    first = found.sites[0]
    settings = {key: value for key, value in settings.items() if key != "int8_keys"}
    groups = first.kv_dim // first.head_dim if settings.get("head_groups") == "each" else 1
    density = max(round(DENSITY * first.kv_dim / groups) // 2 * 2, 2) * groups / first.kv_dim
    config = cskv.CSKVConfig(k_density=density, v_density=density, init="pca", **{**settings, "head_groups": groups})
    rank, rows = config.k_rank(first.kv_dim) // groups, first.kv_dim // groups
    draw = torch.Generator().manual_seed(2)
    bases = [torch.linalg.qr(torch.randn(rows, rank, generator=draw)).Q for _ in range(groups)]
    commuting = config.key_factors == "commuting"
    keys = commuting_factors(first.kv_dim, first.head_dim, rank, draw) if commuting else None
    for site in found.sites:
        pair = [_random(projection, bases) for projection in (site.k, site.v)]
        layers[site.layer_idx] = cskv.LayerFactors(pair[0] if keys is None else keys, pair[1])
    return cskv.CSKVAdapter(config, layers, found.base)


def _random(projection: Any, bases: list[Tensor]) -> cskv.Factors:
    weight = projection.weight.detach().float()
    parts = zip(bases, weight.chunk(len(bases)), strict=True)
    return cskv.Factors.grouped([cskv.Factors((basis.to(part.device).T @ part).cpu(), basis) for basis, part in parts])


def filled(model: LlamaForCausalLM, cache: Cache, prompt: Tensor) -> Tensor:
    """Fill a cache with as many tokens as the prompt has, and return some token to decode next, (batch, 1)."""
    with _only_caching(model):
        for piece in prompt.split(PIECE, dim=1):
            logits = model(piece, **{cache_kwarg(model): cache}, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


@contextmanager
def _only_caching(model: LlamaForCausalLM) -> Iterator[None]:
    """Leave attention and the MLPs out of forwards: queries are what they read."""
    attend = mock.patch.object(nn.functional, "scaled_dot_product_attention", lambda query, *_args, **_how: query)
    mlps = [layer.mlp for layer in model.model.layers]
    for mlp in mlps:
        mlp.forward = lambda x: x
    try:
        with attend:
            yield
    finally:
        for mlp in mlps:
            del mlp.forward


class InPlaceLayer(DynamicLayer):
    """Keys and values written into buffers that are made once, of which what is written is read: nothing is copied."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity, self._length = capacity, 0
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens, and return all of them."""
        new = key_states, value_states
        if not self._buffers:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._buffers = [part.new_empty(*part.shape[:2], self._capacity, part.shape[3]) for part in new]
        begin, self._length = self._length, self._length + key_states.shape[2]
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:, :, begin : self._length] = part
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


def in_place(layers: int, capacity: int) -> DynamicCache:
    """Make an uncompressed cache of `InPlaceLayer`s."""
    cache = DynamicCache()
    cache.layers = [InPlaceLayer(capacity) for _ in range(layers)]
    return cache

"""The compressor of one attention layer: its factors where the layer computes, and what is known of the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.layer import CSKVLayer
from cskv.attachment.static_layer import StaticCSKVLayer
from cskv.attention.attend import AUTO
from cskv.attention.cpu.project import project
from cskv.attention.inputs import KeyOffset, RMSNorm, Rotation, split_heads
from cskv.attention.int8_keys import Int8Keys
from cskv.cache.angles import AngleTable
from cskv.cache.clock import Clock
from cskv.cache.positions import PositionTable
from cskv.factorization.factors import Factors, LayerFactors
from cskv.models.calls import AttentionCall
from cskv.models.probe import SiteRecipe
from cskv.models.recipe import NormStyle, RopeStyle
from cskv.models.sites import AttentionSite

GPU_ALIGNMENT = 16  # bytes: kernels load rows of factors so many at a time


class _Placed(NamedTuple):
    """Factors on one device and in one dtype.

    Attributes:
        factors: of keys and values.
        down, down_bias: the down-projections that read the layer's input, one below the other, and their biases. Those
            of `factors` are views of these.
        constant: (kv_dim,) before RoPE, what latents of commuting keys and `factors` leave out; None for nothing.
        k_rank: how many of the latents that `down` gives are keys'.
        norm: of rebuilt keys, as a kernel can do it, or None.
        int8_keys: the key factors in 8 bits, where keys that are rotated are to be rebuilt by those.
    """

    factors: LayerFactors
    down: Tensor
    down_bias: Tensor | None
    constant: Tensor | None
    k_rank: int
    norm: RMSNorm | None
    int8_keys: Int8Keys | None


class Turned(NamedTuple):
    """What the rotation of sealed keys is, see `AttentionInputs`.

    Attributes:
        placed: the factors that it goes with.
        rotation: of rebuilt keys.
        offset: what commuting latents leave out; None where they leave out nothing.
    """

    placed: _Placed
    rotation: Rotation | None
    offset: KeyOffset | None


@dataclass(frozen=True)
class Setup:
    """What an attachment decides for all its layers.

    Attributes:
        adapter: the compressor of the model.
        fingerprint: of the adapter's factors: a cache that was filled by others cannot be continued.
        owners: layer index -> the layer that keeps the positions for it, or None where keys are not rotated.
        backend: what attends to latents; None where old tokens are rebuilt.
        last: the index of the last compressed layer.
        capacity: tokens to preallocate in new caches.
        int8_keys: whether keys of old tokens are rebuilt by 8-bit products.
    """

    adapter: CSKVAdapter
    fingerprint: str
    owners: dict[int, int | None]
    backend: str | None
    last: int
    capacity: int = 0
    int8_keys: bool = False


class LayerCompressor:
    """What a step of one layer needs and no forward changes.

    Attributes:
        layer_idx: its index in the cache.
        q_heads: its query heads.
        owner_idx: the layer that keeps the positions, by its index in the cache; None where keys are not rotated.
        recipe: how its keys and values follow from its projections.
        setup: what holds for all layers.
        commuting: whether keys become latents after their rotation, and so need none when they are read.
        is_linear: whether rebuilt keys need neither norm nor rotation.
        value_heads: from rebuilt channels to values, where the family normalises these; else None.
    """

    def __init__(self, site: AttentionSite, recipe: SiteRecipe, setup: Setup) -> None:
        self.layer_idx, self.q_heads = site.layer_idx, site.q.kv_dim // site.head_dim
        self.recipe = recipe
        self.setup = setup
        self.owner_idx = setup.owners.get(site.layer_idx)
        self.commuting = setup.adapter.config.key_factors == "commuting"
        plain = recipe.keys.norm_style is NormStyle.NONE and recipe.keys.rope_style is RopeStyle.NONE
        self.is_linear = self.commuting or plain
        self.value_heads: Callable[[Tensor], Tensor] | None = None
        if recipe.values.norm_style is not NormStyle.NONE:
            self.value_heads = lambda channels: recipe.values.heads(channels, None, None)
        self._project = project if setup.backend in (AUTO, "cpu") else linear
        self._factors = setup.adapter.factors(site.layer_idx)
        self._placed: _Placed | None = None

    def placed(self, like: Tensor) -> _Placed:
        """Return the factors where and as the layer computes. Copied once: that is known in the first forward only."""
        placed = self._placed
        if placed is None or placed.down.device != like.device or placed.down.dtype != like.dtype:
            with torch.inference_mode(False), torch.no_grad():
                placed = self._placed = self._place(like)
        return placed

    def latents(self, placed: _Placed, call: AttentionCall, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of keys and values, (batch, new, rank) each, in the factors' dtype.

        Args:
            placed: the factors.
            call: what the attention module was called with.
            keys: (batch, kv_heads, new, head_dim), after norm and RoPE; commuting factors read these.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.latents(placed, call, keys)
        x, down = call.x, placed.down
        of_input = self._project(x if x.dtype == down.dtype else x.to(down.dtype), down, placed.down_bias)
        if not self.commuting:
            rank = placed.k_rank
            return of_input[..., :rank], of_input[..., rank:]
        if placed.constant is not None:  # in full precision: it may be hundreds of times what varies
            keys = keys.float() - self._rotated(placed.constant, call)
        channels = keys.to(down.dtype).transpose(1, 2).flatten(2)
        return self._project(channels, placed.factors.k.down, placed.factors.k.down_bias), of_input

    def turned(self, placed: _Placed, cos: Tensor | None, sin: Tensor | None) -> Turned:
        """Return what follows from the sealed tokens' cos and sin, which are None where keys are not rotated."""
        recipe, rotation, offset = self.recipe, None, None
        if not self.is_linear:
            rotation = Rotation(cos, sin, recipe.keys.heads, recipe.plain_rope, placed.norm, recipe.equal_halves)
        elif cos is not None and placed.constant is not None:
            offset = KeyOffset(Rotation(cos, sin, self._turn, recipe.plain_rope), placed.constant)
        return Turned(placed, rotation, offset)

    def new_layer(self, owner: CSKVLayer | None) -> CSKVLayer:
        """Make this layer's part of a new cache.

        Args:
            owner: the part of the layer that keeps the positions, where that is another one.
        """
        config, capacity, owner_idx = self.setup.adapter.config, self.setup.capacity, self.owner_idx
        owns = owner_idx == self.layer_idx
        table = PositionTable(capacity) if owns else None if owner is None else owner.table
        grids = self.setup.adapter.grids(self.layer_idx)
        exact = config.window, config.group, config.sinks
        return CSKVLayer(*exact, grids, table, owns, self.setup.fingerprint, capacity)

    def new_static_layer(
        self, max_cache_len: int, clock: Clock | None, owner: StaticCSKVLayer | None
    ) -> StaticCSKVLayer:
        """Make this layer's part of a new static cache.

        Args:
            max_cache_len: tokens that it is to hold.
            clock: that of the cache; None for the first layer of ours in it, which sets one.
            owner: as for `new_layer`.
        """
        config, owner_idx = self.setup.adapter.config, self.owner_idx
        own = Clock(config.window, config.group, config.sinks, max_cache_len) if clock is None else clock
        owns = owner_idx == self.layer_idx
        table = AngleTable(own) if owns else None if owner is None else owner.table
        grids = self.setup.adapter.grids(self.layer_idx)
        return StaticCSKVLayer(own, clock is None, grids, table, owns, self.setup.fingerprint)

    def _turn(self, channels: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Apply RoPE alone: (batch, tokens, kv_dim) to (batch, kv_heads, tokens, head_dim)."""
        return self.recipe.keys.rotated(split_heads(channels, self.recipe.keys.head_dim), cos, sin)

    def _rotated(self, constant: Tensor, call: AttentionCall) -> Tensor:
        """Rotate the constant as the new keys are, in fp32."""
        tokens = constant.expand(*call.cos.shape[:2], -1)
        return self._turn(tokens, call.cos.float(), call.sin.float())

    def _place(self, like: Tensor) -> _Placed:
        constant = self._factors.k.bias if self.commuting else None
        factors = self._factors.to(like.device, like.dtype)
        if constant is not None:
            constant = constant.to(like.device, torch.float32)
            factors = replace(factors, k=replace(factors.k, bias=None))
        read_input = [factors.v] if self.commuting else [factors.k, factors.v]
        down, bias = torch.cat([part.down for part in read_input]), None
        if any(part.down_bias is not None for part in read_input):
            bias = torch.cat([_or_zeros(part.down_bias, part) for part in read_input])
        views, start = [], 0
        for part in read_input:
            rows = slice(start, start + part.rank)
            views.append(Factors(down[rows], part.up, part.bias, None if bias is None else bias[rows]))
            start += part.rank
        keys, values = [factors.k, *views] if self.commuting else views
        if like.is_cuda:
            keys = keys.aligned(GPU_ALIGNMENT)
        norm = self.recipe.key_norm
        if norm is not None:
            norm = RMSNorm(norm.weight.to(like.device, like.dtype), norm.eps)
        int8_keys = Int8Keys.of(keys) if self.setup.int8_keys and not self.is_linear else None
        return _Placed(LayerFactors(keys, values), down, bias, constant, keys.rank, norm, int8_keys)


def needs_positions(adapter: CSKVAdapter, layer_idx: int) -> bool:
    """Return whether old keys are rotated when they are read: commuting ones, only the constant that they leave out."""
    return adapter.config.key_factors != "commuting" or adapter.factors(layer_idx).k.bias is not None


def _or_zeros(bias: Tensor | None, factors: Factors) -> Tensor:
    return factors.down.new_zeros(factors.rank) if bias is None else bias

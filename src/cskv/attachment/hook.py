"""The forward pre-hook of one compressed attention module: it makes latents and hands them over.

It sees the layer input, the position embeddings and the cache. It puts our layer into an ordinary cache at first,
stages the latents there, and gives the module what our attention function will look for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.attending import KWARG, Call, is_switched
from cskv.attachment.layer import CSKVLayer, Staged
from cskv.attention.dispatch import attention
from cskv.attention.inputs import AttentionInputs, Logits, RMSNorm, Rotation, split_heads
from cskv.cache.positions import PositionTable
from cskv.errors import CacheError
from cskv.factorization.factors import LayerFactors
from cskv.latents.view import View
from cskv.models.calls import AttentionCall, CallReader
from cskv.models.cos_sin import CosSin
from cskv.models.probe import SiteRecipe
from cskv.models.recipe import NormStyle, RopeStyle
from cskv.models.sites import AttentionSite
from cskv.scratch import Scratch


class SharedState:
    """What the layers of a model share in a forward.

    Args:
        owners: the layer that keeps the positions for each; None where keys are not rotated.
        backend: what attends to latents, or None where old tokens are rebuilt.
        room: tokens that a new cache has room for from the start.

    Attributes:
        scratch: scratch tensors of the attention on latents, used by one layer after the other.
    """

    def __init__(self, owners: dict[int, int | None], backend: str | None, room: int = 0) -> None:
        self.owners = owners
        self.backend = backend
        self.room = room
        self.scratch = Scratch()
        self._last_users = frozenset({owner: index for index, owner in owners.items()}.values())
        # cos and sin of the sealed tokens, by table owner: made by the first layer of a forward, dropped by the last.
        self._sealed_rope: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        query: Tensor,
        view: View,
        factors: LayerFactors,
        rope: Rotation | None,
        logits: Logits,
        value_heads: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Attention on the compressed cache."""
        if self.backend is None:
            raise RuntimeError("old tokens are to be rebuilt")
        inputs = AttentionInputs(view, factors, rope, logits, value_heads)
        return attention(query, inputs, backend=self.backend, scratch=self.scratch)

    def sealed_rope(
        self, layer_idx: int, layer: CSKVLayer, rope: CosSin | None, sealed: int, x: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Cos and sin of the sealed tokens, made once per forward and shared by its layers."""
        owner = self.owners.get(layer_idx)
        if rope is None or owner is None or layer.table is None:
            return None, None
        if layer.owns_table:
            self._sealed_rope[owner] = rope.cos_sin(layer.table.read(sealed), x)
        cos, sin = self._sealed_rope[owner]
        if layer_idx in self._last_users:
            del self._sealed_rope[owner]
        return cos.to(x.device), sin.to(x.device)


class SiteHook:
    """The forward pre-hook of one attention module."""

    def __init__(self, adapter: CSKVAdapter, site: AttentionSite, recipe: SiteRecipe, shared: SharedState) -> None:
        self._adapter = adapter
        self._site = site
        self._recipe = recipe
        self._shared = shared
        self._reader = CallReader(site.module)
        self._factors = adapter.factors(site.layer_idx)
        self._grids = adapter.grids(site.layer_idx)
        self._placed: LayerFactors | None = None
        self._commuting = adapter.config.key_factors == "commuting"

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._reader.read(args, kwargs)
        if call.cache is None:
            _refuse_paged(module)
            return None
        layer = self._layer(call.cache)
        staged = self._stage(module, layer, call)
        layer.stage(staged)
        return None if staged.call is None else (args, {**kwargs, KWARG: staged.call})

    def _stage(self, module: nn.Module, layer: CSKVLayer, call: AttentionCall) -> Staged:
        x = call.x.detach()
        factors = self._factors_for(x)
        positions = None
        if layer.owns_table and self._recipe.rope is not None:
            positions = self._recipe.rope.rows(call.cos, call.sin, call.position_ids)  # type: ignore[arg-type]

        def latents(keys: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                source = keys.detach().transpose(1, 2).flatten(2) if self._commuting else x
                return factors.k.latents(source), factors.v.latents(x)

        def rebuild(k_latents: Tensor, v_latents: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                channels, rope = factors.k.expand(k_latents), self._rope(layer, k_latents.shape[1], x)
                heads = split_heads(channels, self._site.head_dim)
                keys = heads if rope is None else rope.keys(channels, 0)
                return keys, self._recipe.values.heads(factors.v.expand(v_latents), None, None)

        def attend(query: Tensor, view: View, logits: Logits) -> Tensor:
            rope = self._rope(layer, view.sealed, x)
            return self._shared.attend(query, view, factors, rope, logits, self._value_heads)

        attends = (
            self._recipe.attention.why_rebuild is None and self._shared.backend is not None and is_switched(module)
        )
        return Staged(latents, positions, rebuild, Call(attend, self._recipe.attention.ignored) if attends else None)

    @property
    def _value_heads(self) -> Callable[[Tensor], Tensor] | None:
        recipe = self._recipe.values
        return None if recipe.norm_style is NormStyle.NONE else lambda channels: recipe.heads(channels, None, None)

    def _rope(self, layer: CSKVLayer, sealed: int, x: Tensor) -> Rotation | None:
        """How rebuilt keys become those that queries meet; None where they are that already."""
        recipe = self._recipe.keys
        is_linear = recipe.norm_style is NormStyle.NONE and recipe.rope_style is RopeStyle.NONE
        if self._commuting or is_linear:  # commuting ones were rotated, and normalised, when they were cached
            return None
        cos, sin = self._shared.sealed_rope(self._site.layer_idx, layer, self._recipe.rope, sealed, x)
        return Rotation(cos, sin, recipe.heads, self._recipe.plain_rope, self._norm(x))

    def _norm(self, x: Tensor) -> RMSNorm | None:
        """The norm of rebuilt keys where the layer computes, copied once."""
        norm = self._recipe.key_norm
        if norm is not None and (norm.weight.device != x.device or norm.weight.dtype != x.dtype):
            norm = RMSNorm(norm.weight.to(x.device, x.dtype), norm.eps)
            self._recipe = replace(self._recipe, key_norm=norm)
        return norm

    def _factors_for(self, x: Tensor) -> LayerFactors:
        """The factors where and as the layer computes. Copied once: the base model's placement is only known here."""
        placed = self._placed
        if placed is None or placed.k.down.device != x.device or placed.k.down.dtype != x.dtype:
            with torch.no_grad():
                placed = self._factors.to(x.device, x.dtype)
                if x.is_cuda:
                    placed = LayerFactors(placed.k.aligned(16), placed.v)
                self._placed = placed
        return placed

    def _layer(self, cache: Cache) -> CSKVLayer:
        """Our layer of this cache, put in place of an empty ordinary one at first.

        Raises:
            CacheError: the cache is of a kind that cannot hold compressed layers.
        """
        index = self._site.layer_idx
        layers = getattr(cache, "layers", None)
        if not isinstance(layers, list):
            raise CacheError(_refusal(type(cache).__name__))
        if getattr(cache, "offloading", False):
            raise CacheError(_refusal("an offloaded cache"))
        if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
            layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
        if index >= len(layers):
            raise CacheError(_refusal(f"a cache of {len(layers)} layers"))
        layer = layers[index]
        if type(layer) is DynamicLayer:
            layer = layers[index] = self._new_layer(cache, layer)
        if not isinstance(layer, CSKVLayer):
            raise CacheError(_refusal(f"{type(layer).__name__} layers"))
        self._check_same_compressor(layer)
        return layer

    def _new_layer(self, cache: Cache, replaced: DynamicLayer) -> CSKVLayer:
        if replaced.get_seq_length() > 0:
            raise CacheError(
                f"the cache holds {replaced.get_seq_length()} tokens that were written without the compressor; "
                "start a new cache after attaching"
            )
        config, owner = self._adapter.config, self._shared.owners.get(self._site.layer_idx)
        owns, room = owner == self._site.layer_idx, self._shared.room
        table = None if owner is None else PositionTable(room) if owns else cache.layers[owner].table
        return CSKVLayer(config.window, config.group, self._grids, table, owns_table=owns, room=room)

    def _check_same_compressor(self, layer: CSKVLayer) -> None:
        config, store = self._adapter.config, layer.store
        held, ours = store.ranks, (self._factors.k.rank, self._factors.v.rank)
        same = (store.window, store.group, store.grids) == (config.window, config.group, self._grids)
        if not same or held not in (None, ours):
            raise CacheError(
                f"the cache is of another compressor (ranks {held}, window {store.window}, group {store.group}, "
                "or other widths); start a new cache"
            )


def _refuse_paged(module: nn.Module) -> None:
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    if implementation.startswith("paged"):
        raise CacheError("continuous batching keeps its own paged cache, uncompressed; use generate(), or detach first")


def _refusal(kind: str) -> str:
    return (
        f"{kind} cannot hold compressed tokens; use the default dynamic cache "
        "(no cache_implementation, no static, quantized, offloaded or paged cache)"
    )

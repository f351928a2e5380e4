"""Put a compressor on a loaded model, and take it off again.

Attaching adds one forward pre-hook to every compressed attention module and nothing else: no weight, method or config
of the model changes, so that detaching leaves it as it was. The hook computes the latents of the layer input and makes
sure that the layer of the cache about to be updated is ours.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from cskv.adapter import CSKVAdapter
from cskv.base import BaseModelInfo
from cskv.cache.positions import PositionTable
from cskv.errors import CacheError, CSKVError
from cskv.factorization.factors import LayerFactors
from cskv.models.call import AttentionCall, CallReader
from cskv.models.layer import CSKVLayer, Staged
from cskv.models.probe import SiteRecipe, probe
from cskv.models.sites import AttentionSite, find_sites

_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """A compressor on a model. A context manager: leaving it detaches.

    Attributes:
        model: the base model, unchanged.
        adapter: the compressor.
    """

    def __init__(self, model: nn.Module, adapter: CSKVAdapter, sites: list[AttentionSite]) -> None:
        recipes = probe(model, sites)
        self.model = model
        self.adapter = adapter
        commuting = adapter.config.key_factors == "commuting"
        self._owners = _table_owners([] if commuting else sites, recipes)
        self._last_users = frozenset({owner: index for index, owner in self._owners.items()}.values())
        self._hooks = [_SiteHook(self, site, recipes[site.layer_idx]) for site in sites]
        self._handles = [hook.site.module.register_forward_pre_hook(hook, with_kwargs=True) for hook in self._hooks]
        # cos and sin of the sealed tokens, by table owner: made by the first layer of a forward, dropped by the last.
        self.sealed_rope: dict[int, tuple[Tensor, Tensor]] = {}

    def detach(self) -> None:
        """Take the compressor off. Doing it twice does nothing more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if _attachments.get(self.model) is self:
            del _attachments[self.model]

    def owner(self, layer_idx: int) -> int | None:
        """The layer that keeps the positions for this one; None where keys are not rotated."""
        return self._owners.get(layer_idx)

    def is_last_user(self, layer_idx: int) -> bool:
        """Whether no later layer of a forward reads the same positions."""
        return layer_idx in self._last_users

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()


def attach(model: nn.Module, adapter: CSKVAdapter) -> Attachment:
    """Make a loaded decoder model use the compressed cache in `generate`, pipelines and plain calls.

    Args:
        model: a transformers decoder model (with or without a language-model head).
        adapter: factors made for it.

    Returns:
        the attachment; `.detach()`, `cskv.detach(model)` or leaving its `with` block takes the compressor off.

    Raises:
        AdapterError: the adapter was made for another model.
        UnsupportedModelError: the model's attention is not understood (see `cskv.models.probe`).
        CSKVError: a compressor is attached already.
    """
    if model in _attachments:
        raise CSKVError("this model has a compressor attached already; call cskv.detach(model) first")
    sites = find_sites(model)
    adapter.check_fits(BaseModelInfo.from_model(model), sites)
    attachment = Attachment(model, adapter, sites)
    _attachments[model] = attachment
    return attachment


def detach(model: nn.Module) -> None:
    """Take the compressor off a model.

    Raises:
        CSKVError: none is attached.
    """
    attachment = _attachments.get(model)
    if attachment is None:
        raise CSKVError("this model has no compressor attached")
    attachment.detach()


def attachment_of(model: nn.Module) -> Attachment | None:
    """The compressor on a model, or None."""
    return _attachments.get(model)


def _table_owners(sites: list[AttentionSite], recipes: dict[int, SiteRecipe]) -> dict[int, int | None]:
    """Which layer keeps the positions: the first one whose cos and sin are made in the same way."""
    owners: dict[int, int | None] = {}
    first: dict[object, int] = {}
    for site in sites:
        rope = recipes[site.layer_idx].rope
        if rope is None:
            owners[site.layer_idx] = None
            continue
        layer_types = getattr(getattr(site.module, "config", None), "layer_types", None)
        key = (type(rope), getattr(rope, "embedding", None), layer_types[site.layer_idx] if layer_types else None)
        owners[site.layer_idx] = first.setdefault(key, site.layer_idx)
    return owners


class _SiteHook:
    """The forward pre-hook of one attention module."""

    def __init__(self, attachment: Attachment, site: AttentionSite, recipe: SiteRecipe) -> None:
        self.site = site
        self._attachment = attachment
        self._recipe = recipe
        self._reader = CallReader(site.module)
        self._factors = attachment.adapter.factors(site.layer_idx)
        self._grids = attachment.adapter.grids(site.layer_idx)
        self._placed: LayerFactors | None = None
        self._commuting = attachment.adapter.config.key_factors == "commuting"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._reader.read(args, kwargs)
        if call.cache is None:
            _refuse_paged(module)
            return
        layer = self._layer(call.cache)
        layer.stage(self._stage(layer, call))

    def _stage(self, layer: CSKVLayer, call: AttentionCall) -> Staged:
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
                values = self._recipe.values.heads(factors.v.expand(v_latents), None, None)
                channels = factors.k.expand(k_latents)
                if self._commuting:  # they were rotated, and normalised, when they were cached
                    return channels.unflatten(-1, (-1, self.site.head_dim)).transpose(1, 2), values
                cos, sin = self._sealed_rope(layer, k_latents.shape[1], x)
                return self._recipe.keys.heads(channels, cos, sin), values

        return Staged(latents, positions, rebuild)

    def _sealed_rope(self, layer: CSKVLayer, sealed: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Cos and sin of the sealed tokens, made once per forward and shared by its layers."""
        rope, owner = self._recipe.rope, self._attachment.owner(self.site.layer_idx)
        if rope is None or owner is None or layer.table is None:
            return None, None
        shared = self._attachment.sealed_rope
        if layer.owns_table:
            shared[owner] = rope.cos_sin(layer.table.read(sealed), x)
        cos, sin = shared[owner]
        if self._attachment.is_last_user(self.site.layer_idx):
            del shared[owner]
        return cos.to(x.device), sin.to(x.device)

    def _factors_for(self, x: Tensor) -> LayerFactors:
        """The factors where and as the layer computes. Copied once: the base model's placement is only known here."""
        placed = self._placed
        if placed is None or placed.k.down.device != x.device or placed.k.down.dtype != x.dtype:
            with torch.no_grad():
                placed = self._placed = self._factors.to(x.device, x.dtype)
        return placed

    def _layer(self, cache: Cache) -> CSKVLayer:
        """Our layer of this cache, put in place of an empty ordinary one at first.

        Raises:
            CacheError: the cache is of a kind that cannot hold compressed layers.
        """
        index = self.site.layer_idx
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
        config, owner = self._attachment.adapter.config, self._attachment.owner(self.site.layer_idx)
        owns = owner == self.site.layer_idx
        table = None if owner is None else PositionTable() if owns else cache.layers[owner].table
        return CSKVLayer(config.window, config.group, self._grids, table, owns_table=owns)

    def _check_same_compressor(self, layer: CSKVLayer) -> None:
        config, store = self._attachment.adapter.config, layer.store
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

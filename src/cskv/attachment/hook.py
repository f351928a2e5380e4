"""The hooks: of a compressed attention module, which begins a step, and of the model, which hears of guesses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from cskv.attachment.compressor import LayerCompressor
from cskv.attachment.layer import CSKVLayer
from cskv.attachment.static_layer import StaticCSKVLayer
from cskv.attachment.static_step import StaticStep
from cskv.attachment.step import KINDS, KWARG, Step, ThreadState, switched_kind
from cskv.errors import CacheError
from cskv.models.calls import AttentionCall, CallReader
from cskv.models.masks import MaskKind

if TYPE_CHECKING:
    from cskv.attachment.attach import Attachment


class SiteHook:
    """Sees a layer's input, position embeddings and cache, and makes the step that both the cache and attention get.

    It puts our layer into an ordinary or a static cache at first.

    Attributes:
        attachment: to which it belongs; so a model that carries hooks leads to what can take them off.
    """

    def __init__(
        self, module: nn.Module, compressor: LayerCompressor, state: ThreadState, attachment: Attachment
    ) -> None:
        self.attachment = attachment
        self._compressor, self._state = compressor, state
        self._reader = CallReader(module)
        setup = compressor.setup
        self._stands_in = compressor.recipe.attention.why_rebuild is None and setup.backend is not None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._reader.read(args, kwargs)
        if call.cache is None:
            _refuse_paged(module)
            return None
        kind, name = None, module.config._attn_implementation
        if self._stands_in:
            kind = KINDS.get(name) or switched_kind(name)
        layer = self._layer(call.cache, kind is MaskKind.PAIRS)
        if kind is MaskKind.PADDING:
            self._refuse_packed(call, kwargs)
        if isinstance(layer, CSKVLayer):
            step = Step(self._compressor, layer, call, self._state, kind)
        else:
            step = StaticStep(self._compressor, layer, call, self._state, kind)
        layer.step = step
        return None if kind is None else (args, {**kwargs, KWARG: step})

    def _refuse_packed(self, call: AttentionCall, kwargs: dict[str, Any]) -> None:
        """Refuse several texts in a row. FlashAttention keeps them apart in the forward that brings them, and then not.

        Raises:
            CacheError: there are several.
        """
        packed = kwargs.get("cu_seq_lens_q") is not None
        if not packed and call.mask is None and call.position_ids is not None and call.x.shape[0] == 1:
            several = call.position_ids.ndim == 2 and call.position_ids.shape[1] > 1
            packed = several and self._state.orders.is_packed(call.position_ids)
        if packed:
            raise CacheError(
                "several texts are packed in a row without padding (position_ids that start again, or cu_seq_lens); a "
                "cache holds one text a row: pass use_cache=False, or one text a row with an attention_mask"
            )

    def _layer(self, cache: Cache, reads_latents: bool) -> CSKVLayer | StaticCSKVLayer:
        """Return our layer of this cache, put in place of an empty ordinary one at first.

        Raises:
            CacheError: the cache is of a kind that cannot hold compressed layers, or another compressor filled it.
        """
        index, layers = self._compressor.layer_idx, getattr(cache, "layers", None)
        if not isinstance(layers, list):
            raise CacheError(_refusal(type(cache).__name__))
        if getattr(cache, "offloading", False):
            raise CacheError(_refusal("an offloaded cache"))
        if index >= len(layers):
            if getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
                raise CacheError(_refusal(f"a cache of {len(layers)} layers"))
            layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
        layer = layers[index]
        if type(layer) is DynamicLayer:
            layer = layers[index] = self._new_layer(layers, layer)
        elif type(layer) is StaticLayer:
            layer = layers[index] = self._new_static_layer(layers, layer)
        if not isinstance(layer, CSKVLayer | StaticCSKVLayer):
            raise CacheError(_refusal(f"{type(layer).__name__} layers"))
        if not reads_latents and isinstance(layer, StaticCSKVLayer):
            raise CacheError(
                "a static cache needs attention on latents, which this model's attention function or "
                "attention='rebuild' rules out; use the default dynamic cache"
            )
        if layer.fingerprint != self._compressor.setup.fingerprint:
            raise CacheError("the cache was filled by another compressor; start a new cache, or attach that one again")
        return layer

    def _new_layer(self, layers: list[Any], replaced: DynamicLayer) -> CSKVLayer:
        _check_empty(replaced)
        return self._compressor.new_layer(self._owner(layers))

    def _new_static_layer(self, layers: list[Any], replaced: StaticLayer) -> StaticCSKVLayer:
        _check_empty(replaced)
        clock = next((layer.clock for layer in layers if isinstance(layer, StaticCSKVLayer)), None)
        return self._compressor.new_static_layer(replaced.max_cache_len, clock, self._owner(layers))

    def _owner(self, layers: list[Any]) -> Any:
        """Return the layer that keeps the positions for this one, where that is another."""
        owner = self._compressor.owner_idx
        return None if owner is None or owner == self._compressor.layer_idx else layers[owner]


class GuessHook:
    """Notes how many tokens of a forward are a guess: assisted generation wants logits of these, to verify them."""

    def __init__(self, state: ThreadState) -> None:
        self._state = state

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read it off `logits_to_keep`, which counts the token before the guess as well. The last layer forgets it."""
        wanted = kwargs.get("logits_to_keep", 0)
        self._state.guessed = wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0


def _check_empty(replaced: DynamicLayer | StaticLayer) -> None:
    length = int(replaced.get_seq_length())
    if length:
        raise CacheError(
            f"the cache holds {length} tokens that were written without the compressor; start a new cache after "
            "attaching"
        )


def _refuse_paged(module: nn.Module) -> None:
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    if implementation.startswith("paged"):
        raise CacheError("continuous batching keeps its own paged cache, uncompressed; use generate(), or detach first")


def _refusal(kind: str) -> str:
    return (
        f"{kind} cannot hold compressed tokens; use the default dynamic cache or a static one "
        "(no quantized, offloaded or paged cache)"
    )

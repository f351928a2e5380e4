"""Put a compressor on a loaded model, and take it off again.

Attaching adds a forward pre-hook to every compressed attention module and one to the model, and names our attention
function in the config, where the model has one that we can stand in for; no weight or method of the model changes, and
detaching leaves it as it was. The attachment is found by the hooks alone, so it lives and is copied with its model.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.compressor import LayerCompressor, Setup, needs_positions
from cskv.attachment.hook import GuessHook, SiteHook
from cskv.attachment.step import PREFIX, ThreadState, attend
from cskv.attention.attend import AUTO, check_backend
from cskv.errors import ConfigError, CSKVError
from cskv.models.attention_interface import Switch
from cskv.models.masks import mask_kind
from cskv.models.probe import SiteRecipe
from cskv.models.sites import AttentionSite
from cskv.models.survey import Survey, survey

REBUILD = "rebuild"  # no attention on latents


class Attachment:
    """A compressor on a model. A context manager: leaving it detaches.

    Attributes:
        model: the base model, unchanged but for the attention function that its config names.
        adapter: the compressor.
        workspace: of the calling thread: scratch tensors of the attention on latents, and cos and sin of the sealed
            tokens of the cache that it read last. They belong to no cache: some megabytes for the largest tile of
            tokens, and 2 * rotary_dim numbers a token, once for all layers.
    """

    def __init__(
        self, found: Survey, adapter: CSKVAdapter, attention: str, capacity: int = 0, int8_keys: bool = False
    ) -> None:
        self.model = found.model
        self.adapter = adapter
        self.workspace = ThreadState()
        self._handles: list[Any] = []
        self._switch: Switch | None = None
        backend = None if attention == REBUILD else attention
        sites, recipes = found.sites, found.recipes
        rotated = [site for site in sites if needs_positions(adapter, site.layer_idx)]
        owners = _table_owners(rotated, recipes)
        setup = Setup(adapter, adapter.fingerprint(), owners, backend, sites[-1].layer_idx, capacity, int8_keys)
        if backend is not None:
            _say_what_is_rebuilt({site.name: recipes[site.layer_idx].attention.why_rebuild for site in sites})
        try:
            for site in sites:
                compressor = LayerCompressor(site, recipes[site.layer_idx], setup)
                hook = SiteHook(site.module, compressor, self.workspace, self)
                self._handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
            self._handles.append(self.model.register_forward_pre_hook(GuessHook(self.workspace), with_kwargs=True))
            if backend is not None:
                ours = [site.module for site in sites if recipes[site.layer_idx].attention.why_rebuild is None]
                self._switch = Switch(ours, PREFIX, attend, only=mask_kind)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take the compressor off. Doing it twice does nothing more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.workspace.clear()
        if self._switch is not None:
            self._switch.back()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()


def attach(
    model: nn.Module,
    adapter: CSKVAdapter,
    *,
    attention: str = AUTO,
    max_cache_len: int | None = None,
    int8_keys: bool = False,
) -> Attachment:
    """Make a loaded decoder model use the compressed cache in `generate`, pipelines and plain calls.

    Args:
        model: a transformers decoder model (with or without a language-model head).
        adapter: factors made for it.
        attention: what attends to old tokens. "auto", "triton", "cpu", "torch" and "reference" read their latents (see
            `cskv.attention.attend`); "rebuild" makes their keys and values in full at every step, for the model's own
            attention function. Layers whose attention is none that `cskv.models.masks` knows, or is not understood, do
            that too.
            Attention on latents has no weights to return (`output_attentions`); "rebuild" has.
        max_cache_len: tokens to preallocate in every new cache at its first sealing, so that none is ever copied to
            grow; a longer one grows as usual. None grows by a sixteenth whenever a cache is full.
        int8_keys: rebuild the keys of old tokens by products of 8-bit numbers (see `cskv.attention.int8_keys`), which
            tensor cores of a GPU do twice as fast. What the cache stores is the same. Of commuting keys and those of
            models without RoPE nothing is rebuilt, and nothing changes.

    Returns:
        the attachment; `.detach()`, `cskv.detach(model)` or leaving its `with` block takes the compressor off.

    Raises:
        AdapterError: the adapter was made for another model.
        UnsupportedModelError: the model's attention is not understood (see `cskv.models.probe`).
        CSKVError: a compressor is attached already.
        ConfigError: no such `attention`, `max_cache_len` is not positive, or `int8_keys` with "rebuild".
    """
    if attention != REBUILD:
        check_backend(attention, REBUILD)
    if int8_keys and attention == REBUILD:
        raise ConfigError(
            "int8_keys with attention='rebuild': the model's own function gets keys in full; give another attention"
        )
    if max_cache_len is not None and max_cache_len < 1:
        raise ConfigError(f"max_cache_len is {max_cache_len}; expected at least 1 token, or None")
    if attachment_of(model) is not None:
        raise CSKVError("this model has a compressor attached already; call cskv.detach(model) first")
    found = survey(model)
    adapter.check_fits(found)
    return Attachment(found, adapter, attention, max_cache_len or 0, int8_keys)


def detach(model: nn.Module) -> None:
    """Take the compressor off a model.

    Raises:
        CSKVError: none is attached.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise CSKVError("this model has no compressor attached")
    attachment.detach()


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return the compressor on a model, or on a part of it, or None."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook.attachment for hook in hooks if isinstance(hook, SiteHook)), None)


def _table_owners(sites: list[AttentionSite], recipes: dict[int, SiteRecipe]) -> dict[int, int | None]:
    """Find which layer keeps the positions for each: the first whose cos and sin are made in the same way."""
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


def _say_what_is_rebuilt(reasons: dict[str, str | None]) -> None:
    rebuilt = {name: reason for name, reason in reasons.items() if reason is not None}
    if rebuilt:
        name, reason = next(iter(rebuilt.items()))
        warnings.warn(
            f"old keys and values of {len(rebuilt)} of {len(reasons)} layers are rebuilt at every step, which is "
            f"slower: of {name}, {reason}. attention='rebuild' silences this",
            stacklevel=4,
        )

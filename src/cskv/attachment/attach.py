"""Put a compressor on a loaded model, and take it off again.

Attaching adds one forward pre-hook to every compressed attention module and names our attention function in the config,
where the model has one that we can stand in for; no weight or method of the model changes, and detaching leaves it as
it was. The hook computes the latents of the layer input and makes sure that the layer of the cache about to be updated
is ours.
"""

from __future__ import annotations

import warnings
import weakref

from torch import nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.attending import PREFIX, attend
from cskv.attachment.hook import SharedState, SiteHook
from cskv.attention.dispatch import AUTO, check_backend
from cskv.errors import ConfigError, CSKVError
from cskv.models.attention_interface import Switch
from cskv.models.logits import UNDERSTOOD
from cskv.models.probe import SiteRecipe, probe
from cskv.models.sites import AttentionSite
from cskv.models.survey import survey

REBUILD = "rebuild"  # no attention on latents

_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """A compressor on a model. A context manager: leaving it detaches.

    Attributes:
        model: the base model, unchanged but for the attention function that its config names.
        adapter: the compressor.
        scratch: scratch tensors of the attention on latents. They belong to no cache, and stay as large as the
            largest tile of tokens was: some megabytes.
    """

    def __init__(
        self, model: nn.Module, adapter: CSKVAdapter, sites: list[AttentionSite], attention: str, room: int = 0
    ) -> None:
        recipes = probe(model, sites)
        self.model = model
        self.adapter = adapter
        commuting = adapter.config.key_factors == "commuting"
        owners = _table_owners([] if commuting else sites, recipes)
        shared = SharedState(owners, None if attention == REBUILD else attention, room)
        self.scratch = shared.scratch
        self._handles = []
        for site in sites:
            hook = SiteHook(adapter, site, recipes[site.layer_idx], shared)
            self._handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
        self._switch: Switch | None = None
        if attention != REBUILD:
            _say_what_is_rebuilt({site.name: recipes[site.layer_idx].attention.why_rebuild for site in sites})
            self._switch = Switch((site.module for site in sites), PREFIX, attend, only=UNDERSTOOD)

    def detach(self) -> None:
        """Take the compressor off. Doing it twice does nothing more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.scratch.clear()
        if self._switch is not None:
            self._switch.back()
        if _attachments.get(self.model) is self:
            del _attachments[self.model]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()


def attach(
    model: nn.Module, adapter: CSKVAdapter, *, attention: str = AUTO, max_cache_len: int | None = None
) -> Attachment:
    """Make a loaded decoder model use the compressed cache in `generate`, pipelines and plain calls.

    Args:
        model: a transformers decoder model (with or without a language-model head).
        adapter: factors made for it.
        attention: what attends to old tokens. "auto", "triton", "torch" and "reference" read their latents (see
            `cskv.attention.dispatch`); "rebuild" makes their keys and values in full at every step, for the model's own
            attention function. Layers whose attention is not sdpa or eager, or is not understood, do that too.
            Attention on latents has no weights to return (`output_attentions`); "rebuild" has.
        max_cache_len: tokens that every new cache has room for from its first sealing on, so that none is ever copied
            to grow; a longer one grows as usual. None grows by a sixteenth whenever a cache is full.

    Returns:
        the attachment; `.detach()`, `cskv.detach(model)` or leaving its `with` block takes the compressor off.

    Raises:
        AdapterError: the adapter was made for another model.
        UnsupportedModelError: the model's attention is not understood (see `cskv.models.probe`).
        CSKVError: a compressor is attached already.
        ConfigError: no such `attention`, or `max_cache_len` is not positive.
    """
    if attention != REBUILD:
        check_backend(attention, REBUILD)
    if max_cache_len is not None and max_cache_len < 1:
        raise ConfigError(f"max_cache_len is {max_cache_len}; expected at least 1 token, or None")
    if model in _attachments:
        raise CSKVError("this model has a compressor attached already; call cskv.detach(model) first")
    found = survey(model)
    adapter.check_fits(found)
    attachment = Attachment(model, adapter, found.sites, attention, max_cache_len or 0)
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


def _say_what_is_rebuilt(reasons: dict[str, str | None]) -> None:
    rebuilt = {name: reason for name, reason in reasons.items() if reason is not None}
    if rebuilt:
        name, reason = next(iter(rebuilt.items()))
        warnings.warn(
            f"old keys and values of {len(rebuilt)} of {len(reasons)} layers are rebuilt at every step, which is "
            f"slower: of {name}, {reason}. attention='rebuild' silences this",
            stacklevel=4,
        )

"""Whole texts read as from a compressed cache, in one parallel and differentiable forward.

Generation reads old tokens from latents and the newest exactly, one step after the other. Given a whole text, the same
can be had at once: every layer makes both the exact and the rebuilt keys and values of all tokens, and each query reads
the rebuilt ones of the tokens that would be sealed at its step and the exact ones of the rest,

    query t reads token s rebuilt if sinks <= s < sinks + sealed(t), else exactly;
    sealed(t) = ((t - sinks - window) // group) * group, and 0 in a prefill.

That is token-by-token decoding from the first token on, so it is what end-to-end training and measurements need. Memory
is that of a forward with twice the keys; with `checkpointed` the backward pass holds that of one layer. The model's own
attention function does the work, so soft-capping and attention sinks keep their meaning. FlashAttention and flex
attention take no such mask: there sdpa does it, or the reference where it is not plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.attention import reference
from cskv.attention.inputs import split_heads
from cskv.cache.bibranch import sealed_tokens
from cskv.config import CSKVConfig
from cskv.errors import CSKVError, UnsupportedModelError
from cskv.factorization.factors import Factors
from cskv.models.attention_interface import Original, Switch, implementation_of, original
from cskv.models.calls import AttentionCall, CallReader, logits_of
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.masks import KNOWN, MaskKind, mask_kind
from cskv.models.probe import SiteRecipe
from cskv.models.sites import AttentionSite
from cskv.models.survey import Survey
from cskv.quantization.fake import read_back
from cskv.reading.checkpointing import checkpointed_layers

NAME = "cskv_reading"
KWARG = "cskv_reading"
PURPOSES = "Fisher statistics, budgets and distillation"


def check_readable(surveyed: Survey) -> None:
    """Refuse models whose attention cannot be told, by a mask, which tokens each query reads, nor be done in its place.

    Raises:
        UnsupportedModelError: some layer's attention implementation is not known, or does more than is understood.
    """
    for site in surveyed.sites:
        name, why = implementation_of(site.module), None
        kind = mask_kind(name)
        if kind is None:
            why = f"expected one of {KNOWN}"
        elif kind is not MaskKind.PAIRS:
            why = surveyed.recipes[site.layer_idx].attention.why_rebuild
        if why is not None:
            raise UnsupportedModelError(
                f"{PURPOSES} need attention to which it can be told what every query reads; the model's is {name!r}: "
                f"call model.set_attn_implementation('sdpa') first (on the command line --attn-impl sdpa); {why}"
            )


class OldTokens(Protocol):
    """What a query reads in place of the exact keys and values of tokens that are sealed at its step.

    Attributes:
        config: the settings that say which tokens these are.
    """

    config: CSKVConfig

    def keys(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall, keys: Tensor) -> Tensor:
        """Return the keys of all tokens, (batch, kv_heads, tokens, head_dim), from the layer's input or exact keys."""

    def values(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall) -> Tensor:
        """Return the values of all tokens, (batch, kv_heads, tokens, head_dim), from the layer's input."""


class RebuiltTokens:
    """Old tokens as an adapter gives them, through the latents that are stored.

    Args:
        adapter: made for the model, on its device.
    """

    def __init__(self, adapter: CSKVAdapter) -> None:
        self.config = adapter.config
        self._adapter = adapter

    def keys(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall, keys: Tensor) -> Tensor:
        if self.config.key_factors == "commuting":
            constant = self._rotated_bias(site, recipe, call, keys)
            rebuilt = self._rebuild(site, "k", (keys - constant).transpose(1, 2).flatten(2), biased=False)
            return (split_heads(rebuilt, site.head_dim) + constant).to(keys.dtype)
        return recipe.keys.heads(self._rebuild(site, "k", call.x), call.cos, call.sin)

    def values(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall) -> Tensor:
        return recipe.values.heads(self._rebuild(site, "v", call.x), None, None)

    def _rotated_bias(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall, keys: Tensor) -> Tensor:
        """Return what latents of commuting keys leave out, as it is at every position, in fp32; 0 if nothing."""
        bias = self._adapter.factors(site.layer_idx).k.bias
        if bias is None:
            return keys.new_zeros(())
        heads = bias.to(keys.device, torch.float32).view(1, -1, 1, site.head_dim).expand(-1, -1, keys.shape[2], -1)
        return recipe.keys.rotated(heads, call.cos.float(), call.sin.float())

    def _rebuild(self, site: AttentionSite, kind: str, x: Tensor, *, biased: bool = True) -> Tensor:
        """Encode and decode through the stored latents, in the factors' own dtype (fp32 while they train)."""
        factors = self._factors(site, kind, x.device)
        latents = factors.latents(x.to(factors.down.dtype))
        factors = factors if biased else replace(factors, bias=None)
        # Blocks begin behind the sinks, which are never stored so.
        stored = read_back(latents[:, self.config.sinks :], self._adapter.grid(site.layer_idx, kind))
        return factors.expand(torch.cat([latents[:, : self.config.sinks], stored], dim=1)).to(x.dtype)

    def _factors(self, site: AttentionSite, kind: str, _device: torch.device) -> Factors:
        return getattr(self._adapter.factors(site.layer_idx), kind)


class StoredTokens(RebuiltTokens):
    """The same, rounded as a cache stores latents: computed where and in the dtype in which layers compute.

    Args:
        adapter: made for the model, on any device.
        dtype: of the layers.
    """

    def __init__(self, adapter: CSKVAdapter, dtype: torch.dtype) -> None:
        super().__init__(adapter)
        self._dtype = dtype
        self._placed: dict[tuple[int, str], Factors] = {}

    def _factors(self, site: AttentionSite, kind: str, device: torch.device) -> Factors:
        known = self._placed.get((site.layer_idx, kind))
        if known is None:
            known = self._placed[site.layer_idx, kind] = super()._factors(site, kind, device).to(device, self._dtype)
        return known


@contextmanager
def compressed_reading(
    surveyed: Survey, old: CSKVAdapter | OldTokens, *, prefilled: int = 0, checkpointed: bool = False
) -> Iterator[None]:
    """Let the model's forwards, without a cache and without padding, read old tokens as an adapter would give them.

    Gradients reach the adapter's factors. The model's hooks and settings are as before when the block ends.

    Args:
        surveyed: a decoder model.
        old: an adapter made for it, on its device; or what else is read in place of old tokens.
        prefilled: how many of the first tokens come in one forward, which reads all of them exactly.
        checkpointed: keep only the layers' inputs for the backward pass, and run every layer again in it.

    Raises:
        UnsupportedModelError: the model's attention does not read such masks, or a layer does not call it.
        CSKVError: a forward in the block has a cache.
    """
    check_readable(surveyed)
    old = RebuiltTokens(old) if isinstance(old, CSKVAdapter) else old
    mask = lru_cache(maxsize=1)(partial(_mask, old.config, prefilled))  # one for all layers: the backward pass keeps it
    with ExitStack() as stack:
        for site in surveyed.sites:
            hook = _ReadingHook(site, surveyed.recipes[site.layer_idx], old, mask)
            stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(site.module.register_forward_hook(hook.check).remove)
        stack.callback(Switch((site.module for site in surveyed.sites), NAME, _attend).back)
        if checkpointed:
            again = partial(_again, surveyed, old, prefilled)
            stack.enter_context(checkpointed_layers(surveyed.model, surveyed.sites, again))
        yield


@contextmanager
def _again(surveyed: Survey, old: OldTokens, prefilled: int) -> Iterator[None]:
    """Set up a layer's second forward."""
    with evaluation_mode(surveyed.model), compressed_reading(surveyed, old, prefilled=prefilled):
        yield


class _ReadingHook:
    def __init__(
        self,
        site: AttentionSite,
        recipe: SiteRecipe,
        old: OldTokens,
        mask: Callable[[int, torch.device, torch.dtype], Tensor],
    ) -> None:
        self._site, self._recipe, self._old, self._mask = site, recipe, old, mask
        self._reader = CallReader(site.module)
        self._unread = False

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._reader.read(args, kwargs)
        if call.cache is not None:
            raise CSKVError("reading a whole text as compressed goes without a cache; pass use_cache=False")
        self._unread = True
        return args, {**kwargs, KWARG: partial(self._read, call)}

    def check(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self._unread:
            raise UnsupportedModelError(
                f"{self._site.name} does not call transformers' attention interface, so it cannot be given compressed "
                f"keys and values: {PURPOSES} are not for this model"
            )

    def _read(
        self,
        call: AttentionCall,
        function: Original,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Any:
        """Attend to the old keys and values and the exact ones behind them, by a mask for both."""
        self._unread = False
        keys = self._old.keys(self._site, self._recipe, call, key)
        values = self._old.values(self._site, self._recipe, call)
        mask = self._mask(query.shape[2], query.device, query.dtype)
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        kind = mask_kind(implementation_of(self._site.module))
        if kind is MaskKind.PAIRS:
            return function(module, query, keys, values, mask, **kwargs)
        if kind is MaskKind.PADDING and (kwargs.get("sliding_window") or math.inf) < query.shape[2]:
            raise UnsupportedModelError(f"{self._site.name} reads a window of {kwargs['sliding_window']} tokens only")
        logits = logits_of(query, mask, kwargs, self._recipe.attention.ignored)
        if logits.softcap is None and logits.sinks is None:
            sdpa = original(module, "sdpa")
            return sdpa(module, query, keys, values, mask, scaling=logits.scaling)
        output = reference.over(query, keys, values, logits).to(query.dtype)
        return output.transpose(1, 2).contiguous(), None


def _attend(
    function: Original, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    read = kwargs.pop(KWARG, None)
    if read is not None:
        return read(function, module, query, key, value, **kwargs)
    return function(module, query, key, value, mask, **kwargs)


def _mask(config: CSKVConfig, prefilled: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make the (1, 1, tokens, 2 tokens) mask of logits: 0 where a query reads a key, the least number elsewhere."""
    position = torch.arange(tokens, device=device)
    behind = position - config.sinks  # groups are counted from the first token after the sinks
    sealed = (behind >= 0) & (behind < sealed_tokens(behind, config.window, config.group)[:, None])
    sealed &= (position >= prefilled)[:, None]
    exact = ~sealed & (position <= position[:, None])
    reads = torch.cat([sealed, exact], dim=1)
    return torch.zeros(reads.shape, dtype=dtype, device=device).masked_fill_(~reads, torch.finfo(dtype).min)[None, None]

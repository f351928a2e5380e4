"""Whole texts read as from a compressed cache, in one parallel and differentiable forward.

Generation reads old tokens from latents and the newest exactly, one step after the other. Given a whole text, the same
can be had at once: every layer makes both the exact and the rebuilt keys and values of all tokens, and each query reads
the rebuilt ones of the tokens that would be sealed at its step and the exact ones of the rest,

    query t reads token s rebuilt if s < sealed(t), else exactly;  sealed(t) = ((t - window) // group) * group.

That is token-by-token decoding from the first token on, so it is what end-to-end training and sensitivity measurements
need. Memory is that of a forward with twice the keys; with `checkpointed` the backward pass holds that of one layer.
The model's own attention function does the work, so soft-capping and attention sinks keep their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.attention.inputs import split_heads
from cskv.cache.bibranch import sealed_tokens
from cskv.compression.checkpointing import checkpointed_layers
from cskv.config import CSKVConfig
from cskv.errors import CSKVError, UnsupportedModelError
from cskv.factorization.factors import Factors
from cskv.models.attention_interface import Original, Switch, implementation_of
from cskv.models.calls import AttentionCall, CallReader
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.logits import UNDERSTOOD
from cskv.models.probe import SiteRecipe
from cskv.models.sites import AttentionSite
from cskv.models.survey import Survey
from cskv.quantization.fake import read_back

NAME = "cskv_reading"
KWARG = "cskv_reading"
Part = tuple[int, str]  # layer index, "k" or "v"


def check_readable(surveyed: Survey) -> None:
    """Refuse models whose attention cannot be told, by a mask, which tokens each query reads.

    Raises:
        UnsupportedModelError: some layer's attention implementation does not read (queries, keys) masks.
    """
    for site in surveyed.sites:
        if (name := implementation_of(site.module)) not in UNDERSTOOD:
            known = " or ".join(map(repr, sorted(UNDERSTOOD)))
            raise UnsupportedModelError(
                f"distillation and sensitivity need attention that reads a mask of queries and keys, {known}; the "
                f"model's is {name!r}: call model.set_attn_implementation('sdpa') first"
            )


@contextmanager
def compressed_reading(
    surveyed: Survey,
    adapter: CSKVAdapter,
    *,
    only: frozenset[Part] | None = None,
    checkpointed: bool = False,
) -> Iterator[None]:
    """Let the model's forwards, without a cache and without padding, read old tokens as the adapter would give them.

    Gradients reach the adapter's factors. The model's hooks and settings are as before when the block ends.

    Args:
        surveyed: a decoder model.
        adapter: made for it, on its device.
        only: the parts that are compressed, (layer index, "k" or "v"); None compresses all.
        checkpointed: keep only the layers' inputs for the backward pass, and run every layer again in it.

    Raises:
        UnsupportedModelError: the model's attention does not read such masks, or a layer does not call it.
        CSKVError: a forward in the block has a cache.
    """
    check_readable(surveyed)
    mask = lru_cache(maxsize=1)(partial(_mask, adapter.config))  # one for all layers: the backward pass keeps it
    with ExitStack() as stack:
        for site in surveyed.sites:
            hook = _ReadingHook(site, surveyed.recipes[site.layer_idx], adapter, only, mask)
            stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(site.module.register_forward_hook(hook.check).remove)
        stack.callback(Switch((site.module for site in surveyed.sites), NAME, _attend).back)
        if checkpointed:
            again = partial(_again, surveyed, adapter, only)
            stack.enter_context(checkpointed_layers(surveyed.model, surveyed.sites, again))
        yield


@contextmanager
def _again(surveyed: Survey, adapter: CSKVAdapter, only: frozenset[Part] | None) -> Iterator[None]:
    """Set up a layer's second forward."""
    with evaluation_mode(surveyed.model), compressed_reading(surveyed, adapter, only=only):
        yield


class _ReadingHook:
    def __init__(
        self,
        site: AttentionSite,
        recipe: SiteRecipe,
        adapter: CSKVAdapter,
        only: frozenset[Part] | None,
        mask: Callable[[int, torch.device, torch.dtype], Tensor],
    ) -> None:
        self._site, self._recipe, self._adapter, self._mask = site, recipe, adapter, mask
        self._parts = {kind for kind in ("k", "v") if only is None or (site.layer_idx, kind) in only}
        self._reader = CallReader(site.module)
        self._unread = False

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._reader.read(args, kwargs)
        if call.cache is not None:
            raise CSKVError("reading a whole text as compressed goes without a cache; pass use_cache=False")
        if not self._parts:
            return None
        self._unread = True
        return args, {**kwargs, KWARG: partial(self._extended, call)}

    def check(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self._unread:
            raise UnsupportedModelError(
                f"{self._site.name} does not call transformers' attention interface, so it cannot be given compressed "
                "keys and values: distillation and sensitivity are not for this model"
            )

    def _extended(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rebuilt keys and values before the exact ones, and the mask for both."""
        self._unread = False
        keys = self._keys(call, key) if "k" in self._parts else key
        values = self._values(call) if "v" in self._parts else value
        mask = self._mask(query.shape[2], query.device, query.dtype)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), mask

    def _keys(self, call: AttentionCall, keys: Tensor) -> Tensor:
        if self._adapter.config.key_factors == "commuting":
            constant = self._rotated_bias(call, keys)
            rebuilt = self._rebuild("k", (keys - constant).transpose(1, 2).flatten(2), biased=False)
            return (split_heads(rebuilt, self._site.head_dim) + constant).to(keys.dtype)
        return self._recipe.keys.heads(self._rebuild("k", call.x), call.cos, call.sin)

    def _rotated_bias(self, call: AttentionCall, keys: Tensor) -> Tensor:
        """Return what latents of commuting keys leave out, as it is at every position, in fp32; 0 if nothing."""
        bias = self._adapter.factors(self._site.layer_idx).k.bias
        if bias is None:
            return keys.new_zeros(())
        heads = bias.float().view(1, -1, 1, self._site.head_dim).expand(-1, -1, keys.shape[2], -1)
        return self._recipe.keys.rotated(heads, call.cos.float(), call.sin.float())

    def _values(self, call: AttentionCall) -> Tensor:
        return self._recipe.values.heads(self._rebuild("v", call.x), None, None)

    def _rebuild(self, kind: str, x: Tensor, *, biased: bool = True) -> Tensor:
        """Encode and decode through the stored latents, in the factors' own dtype (fp32 while they train)."""
        factors: Factors = getattr(self._adapter.factors(self._site.layer_idx), kind)
        latents = factors.latents(x.to(factors.down.dtype))
        factors = factors if biased else replace(factors, bias=None)
        return factors.expand(read_back(latents, self._adapter.grid(self._site.layer_idx, kind))).to(x.dtype)


def _attend(
    original: Original, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    extended = kwargs.pop(KWARG, None)
    if extended is not None:
        key, value, mask = extended(query, key, value)
    return original(module, query, key, value, mask, **kwargs)


def _mask(config: CSKVConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make the (1, 1, tokens, 2 tokens) mask of logits: 0 where a query reads a key, the least number elsewhere."""
    position = torch.arange(tokens, device=device)
    sealed = sealed_tokens(position, config.window, config.group)[:, None]
    exact = (position >= sealed) & (position <= position[:, None])
    reads = torch.cat([position < sealed, exact], dim=1)
    return torch.zeros(reads.shape, dtype=dtype, device=device).masked_fill_(~reads, torch.finfo(dtype).min)[None, None]

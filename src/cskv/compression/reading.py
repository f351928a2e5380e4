"""What a compressed cache would be read as, in one parallel and differentiable forward.

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
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.compression.checkpointing import checkpointed_layers
from cskv.config import CSKVConfig, sealed_tokens
from cskv.errors import CSKVError
from cskv.factorization.factors import Factors
from cskv.models.attention_interface import Original, Switch
from cskv.models.calls import AttentionCall, CallReader
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.probe import SiteRecipe, probe
from cskv.models.sites import AttentionSite, find_sites
from cskv.quantization.fake import read_back

NAME = "cskv_reading"
KWARG = "cskv_reading"
Part = tuple[int, str]  # layer index, "k" or "v"


@contextmanager
def compressed_reading(
    model: nn.Module,
    adapter: CSKVAdapter,
    *,
    recipes: dict[int, SiteRecipe] | None = None,
    only: frozenset[Part] | None = None,
    checkpointed: bool = False,
) -> Iterator[None]:
    """Let the model's forwards, without a cache and without padding, read old tokens as the adapter would give them.

    Gradients reach the adapter's factors. The model's hooks and settings are as before when the block ends.

    Args:
        model: a decoder model.
        adapter: made for it, on its device.
        recipes: from `probe(model, find_sites(model))`, to save it when this is done often.
        only: the parts that are compressed, (layer index, "k" or "v"); None compresses all.
        checkpointed: keep only the layers' inputs for the backward pass, and run every layer again in it.

    Raises:
        CSKVError: a forward in the block has a cache.
    """
    sites = find_sites(model)
    recipes = recipes or probe(model, sites)
    mask = lru_cache(maxsize=1)(partial(_mask, adapter.config))  # one for all layers: the backward pass keeps it
    with ExitStack() as stack:
        for site in sites:
            hook = _ReadingHook(site, recipes[site.layer_idx], adapter, only, mask)
            stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.callback(Switch((site.module for site in sites), NAME, _attend).back)
        if checkpointed:
            again = partial(_again, model, adapter, recipes, only)
            stack.enter_context(checkpointed_layers(model, sites, again))
        yield


@contextmanager
def _again(
    model: nn.Module, adapter: CSKVAdapter, recipes: dict[int, SiteRecipe], only: frozenset[Part] | None
) -> Iterator[None]:
    """What a layer's second forward runs in."""
    with evaluation_mode(model), compressed_reading(model, adapter, recipes=recipes, only=only):
        yield


@dataclass(frozen=True)
class _Rebuilt:
    """What a layer's attention gets beside the exact keys and values."""

    mask: Callable[[int, torch.device, torch.dtype], Tensor]
    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]


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

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._reader.read(args, kwargs)
        if call.cache is not None:
            raise CSKVError("reading a whole text as compressed goes without a cache; pass use_cache=False")
        if not self._parts:
            return None
        rebuilt = _Rebuilt(
            self._mask,
            keys=lambda keys: self._keys(call, keys) if "k" in self._parts else keys,
            values=lambda values: self._values(call) if "v" in self._parts else values,
        )
        return args, {**kwargs, KWARG: rebuilt}

    def _keys(self, call: AttentionCall, keys: Tensor) -> Tensor:
        if self._adapter.config.key_factors == "commuting":
            channels = keys.transpose(1, 2).flatten(2)
            return self._rebuild("k", channels).unflatten(-1, (-1, self._site.head_dim)).transpose(1, 2)
        return self._recipe.keys.heads(self._rebuild("k", call.x), call.cos, call.sin)

    def _values(self, call: AttentionCall) -> Tensor:
        return self._recipe.values.heads(self._rebuild("v", call.x), None, None)

    def _rebuild(self, kind: str, x: Tensor) -> Tensor:
        """Through the stored latents and back, in the factors' own dtype (fp32 while they train)."""
        factors: Factors = getattr(self._adapter.factors(self._site.layer_idx), kind)
        latents = factors.latents(x.to(factors.down.dtype))
        return factors.expand(read_back(latents, self._adapter.grid(self._site.layer_idx, kind))).to(x.dtype)


def _attend(
    original: Original, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    rebuilt: _Rebuilt | None = kwargs.pop(KWARG, None)
    if rebuilt is not None:
        mask = rebuilt.mask(query.shape[2], query.device, query.dtype)
        key = torch.cat([rebuilt.keys(key), key], dim=2)
        value = torch.cat([rebuilt.values(value), value], dim=2)
    return original(module, query, key, value, mask, **kwargs)


def _mask(config: CSKVConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 1, tokens, 2 tokens), added to the logits: 0 where a query reads a key, the least number elsewhere."""
    position = torch.arange(tokens, device=device)
    sealed = sealed_tokens(position, config.window, config.group)[:, None]
    exact = (position >= sealed) & (position <= position[:, None])
    reads = torch.cat([position < sealed, exact], dim=1)
    return torch.zeros(reads.shape, dtype=dtype, device=device).masked_fill_(~reads, torch.finfo(dtype).min)[None, None]

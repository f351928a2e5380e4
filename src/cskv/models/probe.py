"""A check by experiment that a layer's cached keys and values can be rebuilt from its projections.

Eight tokens go through the unpatched model once. Each layer's projection outputs, its position embeddings and what
its cache received are recorded; then every combination of norm and rotation is tried, and the one that gives what was
cached is kept. A family that matches none is refused at attach time, rather than answered wrongly later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cskv.attention.attend import rotate
from cskv.attention.inputs import RMSNorm
from cskv.errors import DataError, UnsupportedModelError
from cskv.factorization.commuting import RopePairs
from cskv.models.calls import AttentionCall, CallReader
from cskv.models.compat import cache_kwarg
from cskv.models.cos_sin import CosSin, find_cos_sin
from cskv.models.evaluation_mode import evaluation_mode, is_rotary_embedding
from cskv.models.logits import Understanding, understanding
from cskv.models.placement import device_of, plain_arithmetic
from cskv.models.recipe import (
    KEY_NORMS,
    TOLERANCE,
    NormStyle,
    Recipe,
    RopeStyle,
    Rotate,
    candidates,
    closest,
    find_pairs,
    kernel_norm,
    rotation_of,
)
from cskv.models.sites import AttentionSite, watching

PROBE_TOKENS = 8
VALUE_NORMS = ("v_norm",)


@dataclass(frozen=True)
class SiteRecipe:
    """From one layer's projections to its cached keys and values.

    Attributes:
        queries: the queries' recipe, without RoPE: the norm beside the keys' one. Not checked.
        keys, values: their recipes, as found.
        rope: how to recover cos and sin of sealed tokens; None where the keys are not rotated.
        pairs: the channels of a head that RoPE rotates together; None where the keys are not rotated.
        plain_rope: whether keys are rotated by halves of their first channels, after a norm over each head or none.
        equal_halves: whether the halves of cos are equal, and those of sin, as where angles are repeated.
        key_norm: that norm, as a kernel can do it.
        attention: what is known of the layer's attention function.
    """

    queries: Recipe
    keys: Recipe
    values: Recipe
    rope: CosSin | None
    pairs: RopePairs | None
    plain_rope: bool
    equal_halves: bool
    key_norm: RMSNorm | None
    attention: Understanding


class _Forward(NamedTuple):
    """The records of one forward, by layer index; positions by the rotary embedding that was given them."""

    cache: DynamicCache
    calls: dict[int, AttentionCall]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    positions: dict[nn.Module, Tensor]


def probe(model: nn.Module, sites: list[AttentionSite]) -> dict[int, SiteRecipe]:
    """Find the recipe of every site, by layer index.

    Raises:
        UnsupportedModelError: a layer's keys or values match no recipe.
        DataError: the model's keys or values are not finite.
    """
    modules = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "config")]
    device = device_of(model)
    with plain_arithmetic(device), evaluation_mode(model):
        with understanding(modules) as understood:
            forward = _run(model, sites, device)
        return {site.layer_idx: _recipe(site, forward, understood(site.module)) for site in sites}


def _run(model: nn.Module, sites: list[AttentionSite], device: torch.device) -> _Forward:
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    tokens = (torch.arange(1, PROBE_TOKENS + 1, device=device) % config.vocab_size)[None]
    forward = _Forward(DynamicCache(config=config), {}, {}, {}, {})
    readers = {site.module: (site.layer_idx, CallReader(site.module)) for site in sites}

    def on_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
        layer_idx, reader = readers[module]
        forward.calls[layer_idx] = reader.read(args, kwargs)

    def on_positions(embedding: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if isinstance(given, Tensor):
            forward.positions[embedding] = given

    embeddings = [module for module in model.modules() if is_rotary_embedding(module)]
    decoder = model.base_model
    with watching(sites, keys=forward.keys.__setitem__, values=forward.values.__setitem__), ExitStack() as hooks:
        for modules, hook in ((readers, on_call), (embeddings, on_positions)):
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        decoder(input_ids=tokens, use_cache=True, **{cache_kwarg(decoder): forward.cache})  # type: ignore[operator, arg-type]
    return forward


def _recipe(site: AttentionSite, forward: _Forward, attention: Understanding) -> SiteRecipe:
    index = site.layer_idx
    call, k, v = forward.calls.get(index), forward.keys.get(index), forward.values.get(index)
    if call is None or k is None or v is None or index >= len(forward.cache.layers):
        raise UnsupportedModelError(f"{site.name} ({type(site.module).__name__}) did not run or filled no cache")
    layer = forward.cache.layers[index]
    key_candidates = candidates(site.module, KEY_NORMS, site.head_dim, _rotations(site.module, call))
    value_candidates = candidates(site.module, VALUE_NORMS, site.head_dim, [(RopeStyle.NONE, None)])
    keys = _match(site, "keys", key_candidates, k, call, layer.keys)
    values = _match(site, "values", value_candidates, v, call, layer.values)
    rotated = keys.rope_style is not RopeStyle.NONE and call.cos is not None
    norm = kernel_norm(keys, layer.keys) if rotated else None
    odd_norm = norm is None and keys.norm_style is not NormStyle.NONE
    return SiteRecipe(
        _queries(site, keys),
        keys,
        values,
        rope=_rope(forward.positions, site, call) if rotated else None,
        pairs=find_pairs(keys, call.cos) if rotated else None,  # type: ignore[arg-type]
        plain_rope=rotated and not odd_norm and _rotates_plainly(keys, layer.keys, call),
        equal_halves=rotated and all(_halves_are_equal(part) for part in (call.cos, call.sin)),  # type: ignore[arg-type]
        key_norm=norm,
        attention=attention,
    )


def _rotations(module: nn.Module, call: AttentionCall) -> list[tuple[RopeStyle, Rotate | None]]:
    rotate = rotation_of(module) if call.cos is not None else None
    styles = [] if rotate is None else [RopeStyle.FULL, RopeStyle.SLICED]
    return [*((style, rotate) for style in styles), (RopeStyle.NONE, None)]


def _rotates_plainly(recipe: Recipe, heads: Tensor, call: AttentionCall) -> bool:
    """Return whether a recipe rotates as kernels do, tried on some heads."""
    plain = rotate(heads, call.cos, call.sin, torch.empty_like(heads))
    expected = recipe.rotated(heads, call.cos, call.sin)
    return bool((plain - expected).abs().max() <= TOLERANCE.get(heads.dtype, 3e-2) * expected.abs().max())


def _halves_are_equal(part: Tensor) -> bool:
    first, second = part.chunk(2, dim=-1)
    return torch.equal(first, second)


def _queries(site: AttentionSite, keys: Recipe) -> Recipe:
    for key_name, query_name in KEY_NORMS.items():
        if keys.norm is not None and getattr(site.module, key_name, None) is keys.norm:
            return Recipe(site.head_dim, getattr(site.module, query_name, None), keys.norm_style)
    return Recipe(site.head_dim)


def _match(
    site: AttentionSite, kind: str, recipes: Iterator[Recipe], channels: Tensor, call: AttentionCall, cached: Tensor
) -> Recipe:
    """Return the recipe that comes closest to what was cached, if it is close enough."""
    if not torch.isfinite(cached).all():
        raise DataError(
            f"the cached {kind} of {site.name} hold NaN or infinity; check the weights, or load another dtype"
        )
    best, least = closest(recipes, channels, call.cos, call.sin, cached)
    tolerance = TOLERANCE.get(cached.dtype, 3e-2)
    if best is None or not least <= tolerance:
        found = "no combination ran" if best is None else f"the closest is off by {least:.1e} of the largest"
        raise UnsupportedModelError(
            f"the cached {kind} of {site.name} ({type(site.module).__name__}) follow from its projection by no known "
            f"norm and rotation ({found}, {tolerance:.0e} is rounding); see docs/add-a-family.md"
        )
    return best


def _rope(positions: dict[nn.Module, Tensor], site: AttentionSite, call: AttentionCall) -> CosSin:
    layer_types = getattr(getattr(site.module, "config", None), "layer_types", None)
    kind = layer_types[site.layer_idx] if layer_types else None
    return find_cos_sin(positions, call, kind)

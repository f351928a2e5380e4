"""The attention layers of a model and their projections, found generically.

A site is an attention module that owns a layer index and either separate `q_proj`, `k_proj` and `v_proj` or one fused
`qkv_proj` whose output is [queries, keys, values] (Phi3). Whether a site's keys can really be rebuilt from its
projection is not assumed from the names: `cskv.models.probe` compares with what the model caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cskv.errors import UnsupportedModelError
from cskv.models.projection import Projection, features_of

OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj")
Watcher = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer whose cache is to be compressed.

    Attributes:
        name: the module's qualified name in the model.
        layer_idx: its index in the cache.
        module: the attention module. Its first argument (`hidden_states`) is the layer input x.
        q, k, v: its query, key and value projections.
        head_dim: channels per head.
    """

    name: str
    layer_idx: int
    module: nn.Module
    q: Projection
    k: Projection
    v: Projection
    head_dim: int

    @property
    def kv_dim(self) -> int:
        return self.k.kv_dim

    @property
    def hidden_size(self) -> int:
        return self.k.in_features

    @property
    def num_kv_heads(self) -> int:
        return self.kv_dim // self.head_dim

    @property
    def output_weight(self) -> Tensor | None:
        """(hidden, query heads * head_dim) of the projection that reads the heads' outputs, or None if not found."""
        for name in OUTPUT_PROJECTIONS:
            linear = getattr(self.module, name, None)
            if isinstance(linear, nn.Module):
                inputs, outputs = features_of(linear)
                if inputs == self.q.kv_dim:
                    return Projection(linear, 0, outputs, self.q.dtype).weight
        return None


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """Find the full-attention layers of a decoder model, in cache order.

    Layers with a sliding window are left out: their cache is bounded already.

    Raises:
        UnsupportedModelError: the model is no decoder, has no layer that the generic path knows, or all of its layers
            slide (then there is nothing to compress).
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder models are supported")
    decoder = set(getattr(model, "get_decoder", lambda: model)().modules())  # without the towers that see and hear
    found = [
        (path, module)
        for path, module in model.named_modules()
        if module in decoder and isinstance(getattr(module, "layer_idx", None), int) and _has_projections(module)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{name} has no attention module with k_proj/v_proj or qkv_proj and a layer_idx; see docs/add-a-family.md"
        )
    # Layers of a fresh cache; none where transformers decides at the first forward.
    kinds = [type(layer) for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers]  # type: ignore[operator, union-attr]
    full = [(path, module) for path, module in found if not kinds or kinds[module.layer_idx] is DynamicLayer]
    if not full:
        raise UnsupportedModelError(
            f"no layer of {name} caches all tokens (sliding windows are bounded already): nothing to compress"
        )
    dtype = getattr(model, "dtype", torch.get_default_dtype())
    sites = sorted((_site(path, module, dtype) for path, module in full), key=lambda site: site.layer_idx)
    indices = [site.layer_idx for site in sites]
    if len(set(indices)) != len(indices):
        raise UnsupportedModelError(f"{name} has several attention modules with the same layer_idx: {indices}")
    return sites


def _has_projections(module: nn.Module) -> bool:
    separate = all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj"))
    return (separate or hasattr(module, "qkv_proj")) and not getattr(module, "is_cross_attention", False)


def _site(path: str, module: nn.Module, dtype: torch.dtype) -> AttentionSite:
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int):
        raise UnsupportedModelError(f"{path} ({type(module).__name__}) does not tell its head_dim")
    if hasattr(module, "qkv_proj"):
        queries = module.config.num_attention_heads * head_dim
        kv_dim = module.config.num_key_value_heads * head_dim
        total = features_of(module.qkv_proj)[1]
        if queries + 2 * kv_dim != total:
            raise UnsupportedModelError(
                f"{path}.qkv_proj has {total} rows; expected {queries} query + 2 x {kv_dim} key and value rows"
            )
        bounds = pairwise((0, queries, queries + kv_dim, total))
        q, k, v = (Projection(module.qkv_proj, start, stop, dtype) for start, stop in bounds)
    else:
        linears = (module.q_proj, module.k_proj, module.v_proj)
        q, k, v = (Projection(linear, 0, features_of(linear)[1], dtype) for linear in linears)
    if k.kv_dim != v.kv_dim or k.kv_dim % head_dim:
        raise UnsupportedModelError(
            f"{path}: keys have {k.kv_dim} and values {v.kv_dim} channels; expected equal multiples of {head_dim}"
        )
    return AttentionSite(path, module.layer_idx, module, q, k, v, head_dim)


@contextmanager
def watching(
    sites: Sequence[AttentionSite],
    *,
    inputs: Watcher | None = None,
    keys: Watcher | None = None,
    values: Watcher | None = None,
    queries: Watcher | None = None,
) -> Iterator[None]:
    """Call the watchers with (layer index, tensor) during every forward inside the block.

    Args:
        sites: the layers to watch.
        inputs: gets the layer input x, (batch, tokens, hidden).
        keys: gets the key projection's output, bias included, before any norm and RoPE, (batch, tokens, kv_dim).
        values, queries: the same of the value and the query projection.
    """
    with ExitStack() as hooks:
        for site in sites:
            if inputs is not None:
                hook = site.module.register_forward_pre_hook(_input_hook(site.layer_idx, inputs), with_kwargs=True)
                hooks.callback(hook.remove)
            for projection, watcher in ((site.q, queries), (site.k, keys), (site.v, values)):
                if watcher is not None:
                    hook = projection.linear.register_forward_hook(_output_hook(site.layer_idx, projection, watcher))
                    hooks.callback(hook.remove)
        yield


def _input_hook(layer_idx: int, watcher: Watcher) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        watcher(layer_idx, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    return hook


def _output_hook(layer_idx: int, projection: Projection, watcher: Watcher) -> Callable[..., None]:
    return lambda _module, _args, output: watcher(layer_idx, projection.select(output))

"""What a cache really occupies: the bytes of the tensors that it holds, beside what the uncompressed cache would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.compressor import needs_positions
from cskv.attachment.layer import CSKVLayer
from cskv.attachment.static_layer import StaticCSKVLayer
from cskv.cache.bibranch import sealed_tokens
from cskv.cache.buffer import grown
from cskv.cache.latents import LatentBytes, bytes_of_filled
from cskv.cache.positions import POSITION_DTYPE
from cskv.errors import ConfigError
from cskv.models.sites import find_sites

OURS = CSKVLayer | StaticCSKVLayer
HELD = ("payload_bytes", "scale_bytes", "minimum_bytes", "window_bytes", "position_bytes", "slack_bytes", "other_bytes")


@dataclass(frozen=True)
class CacheReport:
    """Allocated bytes of a cache, all layers together.

    Attributes:
        tokens: tokens cached per sequence.
        batch: sequences.
        payload_bytes: latents of sealed tokens, or their packed codes.
        scale_bytes, minimum_bytes: of the blocks of packed latents.
        window_bytes: exact keys and values of the sinks and the newest tokens, in compressed layers, and the latents to
            come of the latter.
        position_bytes: what RoPE needs to rotate rebuilt keys.
        slack_bytes: spare capacity for latents.
        other_bytes: layers that are not compressed (sliding windows, or all layers of an ordinary cache).
        uncompressed_bytes: what an ordinary cache holds of the same tokens.
    """

    tokens: int
    batch: int
    payload_bytes: int
    scale_bytes: int
    minimum_bytes: int
    window_bytes: int
    position_bytes: int
    slack_bytes: int
    other_bytes: int
    uncompressed_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything that the cache holds."""
        return sum(getattr(self, name) for name in HELD)

    @property
    def ratio(self) -> float:
        """Total bytes as a share of the uncompressed cache's."""
        return self.total_bytes / self.uncompressed_bytes if self.uncompressed_bytes else 1.0

    @property
    def bytes_per_token(self) -> float:
        """Total bytes per cached token."""
        return self.total_bytes / (self.tokens * self.batch) if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready values."""
        figures = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return figures | {"total_bytes": self.total_bytes, "ratio": self.ratio, "bytes_per_token": self.bytes_per_token}


def cache_report(cache: Cache, model: nn.Module) -> CacheReport:
    """Measure the bytes of a cache, compressed or not.

    Args:
        cache: what `generate` or a forward returned. Layers of other classes, transformers' quantised ones too, count
            as `other_bytes`, and as no smaller when uncompressed (`cskv.evaluation.cache_size` measures that as well).
        model: the model that filled it; it tells the shape of uncompressed keys and values.
    """
    ours = [layer for layer in cache.layers if isinstance(layer, OURS)]
    others = [layer for layer in cache.layers if not isinstance(layer, OURS)]
    other_bytes = allocated_bytes(others)
    channels = {site.layer_idx: site.kv_dim for site in find_sites(model)}
    uncompressed = other_bytes
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, OURS) and layer.store.length:
            elements = layer.store.batch * layer.store.length * 2 * channels[index]
            uncompressed += elements * layer.dtype.itemsize
    latents = sum((layer.store.latent_nbytes() for layer in ours), LatentBytes())
    return CacheReport(
        tokens=int(cache.get_seq_length()),  # a tensor in static caches
        batch=_batch(ours, others),
        payload_bytes=latents.payload,
        scale_bytes=latents.scales,
        minimum_bytes=latents.minima,
        window_bytes=sum(layer.store.window_nbytes() for layer in ours),
        position_bytes=sum(layer.position_nbytes() for layer in ours),
        slack_bytes=latents.slack,
        other_bytes=other_bytes,
        uncompressed_bytes=uncompressed,
    )


def adapter_report(adapter: CSKVAdapter, tokens: int, dtype: torch.dtype = torch.bfloat16) -> CacheReport:
    """Compute the bytes of a cache that an adapter would fill, without its model and without allocating them.

    Layers of a model that are not compressed (sliding windows) are unknown here and left out. Positions count 4 bytes a
    token, once for all layers, as for RoPE of fixed frequencies; commuting keys have some only where they have a bias.

    Args:
        adapter: any.
        tokens: of one sequence, prefilled at once; at least 1.
        dtype: of the model.

    Raises:
        ConfigError: `tokens` is no whole number from 1 up.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConfigError(f"tokens is {tokens!r}; expected a whole number, at least 1")
    config, latents, window, uncompressed = adapter.config, LatentBytes(), 0, 0
    sinks = min(tokens, config.sinks)
    sealed = sealed_tokens(tokens - sinks, config.window, config.group)
    for index in adapter.layer_indices:
        factors = adapter.factors(index)
        for part, grid in zip((factors.k, factors.v), adapter.grids(index), strict=True):
            latents += bytes_of_filled(sealed, part.rank, dtype, grid)
            window += ((tokens - sealed) * part.kv_dim + (tokens - sealed - sinks) * part.rank) * dtype.itemsize
            uncompressed += tokens * part.kv_dim * dtype.itemsize
    has_positions = any(needs_positions(adapter, index) for index in adapter.layer_indices)
    return CacheReport(
        tokens=tokens,
        batch=1,
        payload_bytes=latents.payload,
        scale_bytes=latents.scales,
        minimum_bytes=latents.minima,
        window_bytes=window,
        position_bytes=grown(tokens) * POSITION_DTYPE.itemsize if has_positions else 0,
        slack_bytes=latents.slack,
        other_bytes=0,
        uncompressed_bytes=uncompressed,
    )


def _batch(ours: list[CSKVLayer | StaticCSKVLayer], others: list[Any]) -> int:
    sizes = [layer.store.batch for layer in ours if layer.store.length]
    sizes += [tensor.shape[0] for layer in others for tensor in _tensors(layer) if tensor.numel()]
    return sizes[0] if sizes else 0


def _tensors(layer: Any) -> Iterable[Tensor]:
    return (value for value in (getattr(layer, "keys", None), getattr(layer, "values", None)) if value is not None)


def allocated_bytes(held: Any) -> int:
    """The bytes of all tensor storages that an object leads to, each counted once.

    Found by walking attributes and containers, whatever the classes: payload, scales, zero points and exact tokens of a
    quantised cache, slack of one that grows ahead. Modules are passed over, since their weights are the model's.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in _held_tensors(held):
        storage = tensor.untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _held_tensors(root: Any) -> Iterator[Tensor]:
    """The plain tensors that an object leads to."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor) and not hasattr(item, "__tensor_flatten__"):
            yield item
        else:
            stack.extend(_children(item))


def _children(item: Any) -> Iterable[Any]:
    """What an object holds directly."""
    if isinstance(item, Tensor):  # a wrapper: its own storage is a fiction, of the size of the numbers it stands for
        names, _ = item.__tensor_flatten__()  # type: ignore[attr-defined]
        return [getattr(item, name) for name in names]
    if isinstance(item, type | ModuleType | FunctionType | MethodType | nn.Module):
        return ()
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, list | tuple | set | frozenset):
        return item
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(item, name)]
    return [*getattr(item, "__dict__", {}).values(), *(getattr(item, name) for name in slots)]

"""How blocks of vLLM's pool are cut: tokens per block, and how many layers' rings share one.

A block holds a page of every layer, side by side. Groups of tokens that are packed together must not be cut. A
request's rings take blocks as well: as many layers as fit share one, so that a block should hold the ring of one layer
at least; vLLM widens all blocks otherwise, and latents leave the rest empty.

With pipeline parallelism a block has a part on every rank, and vLLM wants each of a request's blocks to be used on
every rank. So all ranks cut their layers into equally many bundles, whose rings have pages of the same size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cskv.errors import ConfigError
from cskv.latents.pages import ALIGNMENT
from cskv.vllm.served import Served
from cskv.vllm.shards import Shard

logger = logging.getLogger("vllm.cskv")


class Rings(NamedTuple):
    """How the rings of a request are cut into blocks.

    Attributes:
        bundles: of layers, on every pipeline rank; each takes a block.
        page_bytes: of a bundle's page, the same for all.
        ring_bytes: of the place that every layer's ring has in it.
    """

    bundles: int
    page_bytes: int
    ring_bytes: int

    def bounds(self, layers: int) -> list[int]:
        """Where each bundle of a rank's layers begins, and where the last one ends."""
        return [i * layers // self.bundles for i in range(self.bundles + 1)]


def cut_rings(block_bytes: int, ring_bytes: int, layers: Sequence[int]) -> Rings:
    """Cut the rings.

    Args:
        block_bytes: of the pages of all layers.
        ring_bytes: of the largest ring of a layer.
        layers: on each pipeline rank.
    """
    share = _share(block_bytes, len(layers))
    together = max(1, share // ring_bytes)
    bundles = min(-(-max(layers) // together), min(layers))
    most = max(-(-count // bundles) for count in layers)
    return Rings(bundles, max(share, most * ring_bytes), ring_bytes)


def rings_of(served: Served, shard: Shard, dtype: Any, head_dim: int, block_size: int, layers: Sequence[int]) -> Rings:
    """How the rings of a served adapter are cut.

    Raises:
        ConfigError: pipeline stages have so different numbers of layers that a block cannot be used on all of them.
    """
    block = sum(served.layout(i, shard, dtype).page_bytes(block_size) for i in served.settings.ranks)
    rings = cut_rings(block, _largest_ring(served, shard, dtype, head_dim), layers)
    if len(layers) > 1 and rings.page_bytes > _share(block, len(layers)):
        raise ConfigError(
            f"blocks of {block_size} tokens cannot hold the exact windows of stages of {list(layers)} layers; give a "
            "larger --block-size, or as many layers to every stage"
        )
    return rings


def choose_block_size(served: Served, shard: Shard, vllm_config: Any) -> None:
    """Choose a block size, or check the one that was asked for.

    Raises:
        ConfigError: the one that was asked for cuts groups.
    """
    if not served.has_ring:
        return
    cache, model = vllm_config.cache_config, vllm_config.model_config
    stages = vllm_config.parallel_config.pipeline_parallel_size
    group = served.config.group if served.is_grouped else 1
    step = math.lcm(cache.DEFAULT_BLOCK_SIZE, group)
    least = least_block_size(served, shard, model.dtype, model.get_head_size(), step, stages)
    if not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = least, True
    elif cache.block_size % group:
        raise ConfigError(
            f"a block of {cache.block_size} tokens would cut groups of {group} that are packed together; "
            f"give --block-size a multiple of {group}"
        )
    elif cache.block_size < least:
        reason = f"blocks of {cache.block_size} tokens cannot hold the exact window of one layer"
        if stages > 1:
            raise ConfigError(f"{reason}, which {stages} pipeline stages need; give --block-size {least} or more")
        logger.warning("%s, so memory is wasted; give --block-size %d or more", reason, least)
    sizes = {served.layout(i, shard, model.dtype).page_bytes(cache.block_size) for i in served.settings.ranks}
    if stages > 1 and len(sizes) > 1:
        raise ConfigError(
            f"{stages} pipeline stages, an exact window and layers of different ranks or widths do not go together in "
            "vLLM's block pool; serve with window 0 and group 1, or with one rank for all layers"
        )


def least_block_size(served: Served, shard: Shard, dtype: Any, head_dim: int, step: int, stages: int = 1) -> int:
    """The least multiple of `step` tokens at which a stage's part of a block holds as many rings as it has to."""
    ring, count = _largest_ring(served, shard, dtype, head_dim), len(served.settings.ranks)
    layouts = [served.layout(i, shard, dtype) for i in served.settings.ranks]
    if stages > count:
        raise ConfigError(f"{stages} pipeline stages for {count} layers; give at most as many")
    layers = [count // stages + (i < count % stages) for i in range(stages)]
    size = step
    while True:
        block = sum(layout.page_bytes(size) for layout in layouts)
        if cut_rings(block, ring, layers).page_bytes <= _share(block, stages):
            return size
        size += step


def _share(block_bytes: int, stages: int) -> int:
    """A pipeline stage's part of a block."""
    return block_bytes // stages // ALIGNMENT * ALIGNMENT


def _largest_ring(served: Served, shard: Shard, dtype: Any, head_dim: int) -> int:
    return max(served.ring(i, shard, dtype, head_dim).page_bytes for i in served.settings.ranks)

"""The division of vLLM's pool into blocks: tokens per block, and how many layers' rings share one.

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
from cskv.vllm.served import NO_RING
from cskv.vllm.shards import ServedShard

logger = logging.getLogger("vllm.cskv")


class Rings(NamedTuple):
    """The division of a request's rings into blocks.

    Attributes:
        bundles: bundles of layers on every pipeline rank; each takes a block.
        page_bytes: bytes of a bundle's page, the same for all.
        ring_bytes: bytes that every layer's ring has in it.
    """

    bundles: int
    page_bytes: int
    ring_bytes: int

    def bounds(self, layers: int) -> list[int]:
        """Return the first layer of each bundle on a rank of so many layers, and the end of the last one."""
        return [i * layers // self.bundles for i in range(self.bundles + 1)]


def cut_rings(block_bytes: int, ring_bytes: int, layers: Sequence[int]) -> Rings:
    """Cut the rings.

    Args:
        block_bytes: bytes of the pages of all layers.
        ring_bytes: bytes of the largest ring of a layer.
        layers: number of layers on each pipeline rank.
    """
    stage = _stage_bytes(block_bytes, len(layers))
    together = max(1, stage // ring_bytes)
    bundles = min(-(-max(layers) // together), min(layers))
    most = max(-(-count // bundles) for count in layers)
    return Rings(bundles, max(stage, most * ring_bytes), ring_bytes)


def rings_of(share: ServedShard, block_size: int, layers: Sequence[int]) -> Rings:
    """Cut the rings of a rank's share.

    Args:
        share: the rank's share of the adapter.
        block_size: tokens per block.
        layers: number of layers on each pipeline rank.

    Raises:
        ConfigError: pipeline stages have so different numbers of layers that a block cannot be used on all of them.
    """
    block = share.block_bytes(block_size)
    rings = cut_rings(block, share.ring_bytes, layers)
    if len(layers) > 1 and rings.page_bytes > _stage_bytes(block, len(layers)):
        raise ConfigError(
            f"blocks of {block_size} tokens cannot hold the exact tokens of stages of {list(layers)} layers; give a "
            "larger --block-size, or as many layers to every stage"
        )
    return rings


def choose_block_size(share: ServedShard, vllm_config: Any) -> None:
    """Choose a block size, or check the one that was asked for.

    Raises:
        ConfigError: the one that was asked for cuts groups.
    """
    if not share.served.has_ring:
        return
    cache, stages = vllm_config.cache_config, vllm_config.parallel_config.pipeline_parallel_size
    group = share.served.config.group if share.is_grouped else 1
    step = math.lcm(cache.DEFAULT_BLOCK_SIZE, group)
    least = least_block_size(share, step, stages)
    if not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = least, True
    elif cache.block_size % group:
        raise ConfigError(
            f"a block of {cache.block_size} tokens would cut groups of {group} that are packed together; "
            f"give --block-size a multiple of {group}"
        )
    elif cache.block_size < least:
        reason = f"blocks of {cache.block_size} tokens cannot hold the exact tokens of one layer"
        if stages > 1:
            raise ConfigError(f"{reason}, which {stages} pipeline stages need; give --block-size {least} or more")
        logger.warning("%s, so memory is wasted; give --block-size %d or more", reason, least)
    sizes = {layout.page_bytes(cache.block_size) for layout in share.layouts.values()}
    if stages > 1 and len(sizes) > 1:
        raise ConfigError(
            f"{stages} pipeline stages, exact tokens and layers of different ranks or widths do not go together in "
            f"vLLM's block pool; serve with {NO_RING}, or with one rank for all layers"
        )


def least_block_size(share: ServedShard, step: int, stages: int = 1) -> int:
    """Find the least multiple of `step` tokens at which a stage's part of a block holds as many rings as it has to."""
    count = len(share.layouts)
    if stages > count:
        raise ConfigError(f"{stages} pipeline stages for {count} layers; give at most as many")
    layers = [count // stages + (i < count % stages) for i in range(stages)]
    size = step
    while True:
        block = share.block_bytes(size)
        if cut_rings(block, share.ring_bytes, layers).page_bytes <= _stage_bytes(block, stages):
            return size
        size += step


def _stage_bytes(block_bytes: int, stages: int) -> int:
    """Return the bytes of a pipeline stage's part of a block."""
    return block_bytes // stages // ALIGNMENT * ALIGNMENT

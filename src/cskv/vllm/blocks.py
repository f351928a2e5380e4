"""How many tokens a block of vLLM's pool holds, where the compressed cache has a say in it.

A block holds a page of every layer. Groups of tokens that are packed together must not be cut, and a block should hold
the ring of at least one layer: vLLM widens blocks otherwise, and the latents leave the rest empty.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from cskv.errors import ConfigError
from cskv.vllm.served import Served
from cskv.vllm.shards import Shard

logger = logging.getLogger("vllm.cskv")


def choose_block_size(served: Served, shard: Shard, vllm_config: Any) -> None:
    """Choose a block size, or check the one that was asked for.

    Raises:
        ConfigError: the one that was asked for cuts groups.
    """
    if not served.has_ring:
        return
    cache, model = vllm_config.cache_config, vllm_config.model_config
    group = served.config.group if served.is_grouped else 1
    least = least_block_size(
        served, shard, model.dtype, model.get_head_size(), math.lcm(cache.DEFAULT_BLOCK_SIZE, group)
    )
    if not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = least, True
        return
    if cache.block_size % group:
        raise ConfigError(
            f"a block of {cache.block_size} tokens would cut groups of {group} that are packed together; "
            f"give --block-size a multiple of {group}"
        )
    if cache.block_size < least:
        logger.warning(
            "blocks of %d tokens are smaller than the exact window of one layer, which wastes memory; "
            "--block-size %d is the least that does not",
            cache.block_size,
            least,
        )


def least_block_size(served: Served, shard: Shard, dtype: Any, head_dim: int, step: int) -> int:
    """The least multiple of `step` tokens whose latents, of all layers, are as large as the ring of any layer."""
    layers = list(served.settings.ranks)
    ring = max(served.ring(i, shard, dtype, head_dim).page_bytes for i in layers)
    layouts = [served.layout(i, shard, dtype) for i in layers]
    size = step
    while sum(layout.page_bytes(size) for layout in layouts) < ring:
        size += step
    return size

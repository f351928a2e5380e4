"""The share of a tensor-parallel rank: rows of the up-projections for its kv heads, and the latents that these need.

Factors that all kv heads share need all latents on every rank. Replication takes the gain of tensor parallelism away:
a rank keeps `r_k + r_v` numbers a token where it would have kept `2 * kv_dim / ranks` uncompressed. Factors per head
group (`CSKVConfig.head_groups`) need only the latents of the groups whose heads are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cskv.adapter.folder import read_layer
from cskv.cache.ring import Ring
from cskv.errors import AdapterError, ConfigError
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.pages import PageLayout
from cskv.quantization.grid import Grid
from cskv.vllm.served import Served


@dataclass(frozen=True)
class Shard:
    """The kv heads of one tensor-parallel rank.

    Attributes:
        first, heads: index of its first kv head, and how many it has.
        total_heads: kv heads of the model.
    """

    first: int
    heads: int
    total_heads: int

    @classmethod
    def of_rank(cls, rank: int, ranks: int, kv_heads: int) -> Shard:
        """Split as vLLM does: evenly, or each head on several ranks where there are fewer heads than ranks."""
        if kv_heads >= ranks:
            return cls(rank * (kv_heads // ranks), kv_heads // ranks, kv_heads)
        return cls(rank * kv_heads // ranks, 1, kv_heads)

    def groups(self, head_groups: int) -> range:
        """Return the head groups that its heads belong to.

        Raises:
            ConfigError: heads do not split evenly into groups, or groups and ranks cut across each other.
        """
        per_group = self.total_heads // head_groups
        if self.total_heads % head_groups or (per_group % self.heads and self.heads % per_group):
            raise ConfigError(
                f"{head_groups} head groups of {self.total_heads} kv heads cut across ranks of {self.heads}: "
                "give a number of groups and of ranks that divide each other"
            )
        last = self.first + self.heads - 1
        return range(self.first // per_group, last // per_group + 1)

    def rank_of(self, rank: int, head_groups: int) -> int:
        """Return the latents per token on this rank, of `rank` in the model."""
        return rank // head_groups * len(self.groups(head_groups))

    def factors(self, factors: Factors, head_groups: int) -> Factors:
        """Cut out this rank's part of a layer's factors."""
        groups, head_dim = self.groups(head_groups), factors.kv_dim // self.total_heads
        latents = slice(factors.rank // head_groups * groups.start, factors.rank // head_groups * groups.stop)
        channels = slice(self.first * head_dim, (self.first + self.heads) * head_dim)
        return Factors(
            factors.down[latents],
            factors.up[channels],
            None if factors.bias is None else factors.bias[channels],
            None if factors.down_bias is None else factors.down_bias[latents],
        )


@dataclass(frozen=True)
class ServedShard:
    """One tensor-parallel rank's share of a served adapter, of all layers.

    Attributes:
        served: the adapter.
        shard: the rank's kv heads.
        dtype: of the model.
        head_dim: channels of a head.
    """

    served: Served
    shard: Shard
    dtype: torch.dtype
    head_dim: int

    @classmethod
    def of_rank(cls, served: Served, model_config: Any, rank: int, ranks: int) -> ServedShard:
        """Take one rank's share, for a model as vLLM's `ModelConfig` describes it."""
        shard = Shard.of_rank(rank, ranks, model_config.get_total_num_kv_heads())
        return cls(served, shard, model_config.dtype, model_config.get_head_size())

    @cached_property
    def layouts(self) -> dict[int, PageLayout]:
        """The page layout of every layer's latents."""
        config, widths, layouts = self.served.config, self.served.settings.widths, {}
        for layer, sizes in self.served.settings.ranks.items():
            k, v = (self.shard.rank_of(sizes[kind], config.head_groups) for kind in ("k", "v"))
            grids = [
                Grid.from_config(config, kind, rank, widths.get((layer, kind))) for kind, rank in (("k", k), ("v", v))
            ]
            layouts[layer] = PageLayout(k, v, self.dtype, *grids)
        return layouts

    @cached_property
    def rings(self) -> dict[int, Ring]:
        """The ring of every layer; meaningless unless the adapter `has_ring`."""
        config, rings = self.served.config, {}
        for layer, layout in self.layouts.items():
            grids = layout.k_grid, layout.v_grid
            k, v = (0 if grid is None or grid.block_tokens == 1 else grid.rank for grid in grids)
            sizes = self.shard.heads, self.head_dim, k, v
            rings[layer] = Ring(config.window, config.group, *sizes, self.dtype, config.sinks)
        return rings

    @property
    def is_grouped(self) -> bool:
        """Whether latents are packed in groups of tokens."""
        return any(ring.k_waiting or ring.v_waiting for ring in self.rings.values())

    @cached_property
    def ring_bytes(self) -> int:
        """Bytes of the largest ring of a layer."""
        return max(ring.page_bytes for ring in self.rings.values())

    def block_bytes(self, block_size: int) -> int:
        """Count the bytes of a block: one page of `block_size` tokens for every layer."""
        return sum(layout.page_bytes(block_size) for layout in self.layouts.values())

    def factors(self, layer: int) -> LayerFactors:
        """Read the rank's part of one layer's factors.

        Raises:
            AdapterError: the folder is damaged, or its settings do not say how its factors were made.
        """
        folder, settings = self.served.folder, self.served.settings
        factors, groups = read_layer(folder, settings, layer), settings.config.head_groups
        expected = groups, settings.ranks[layer]["kv_dim"]
        for kind, part in (("k", factors.k), ("v", factors.v)):
            if (part.groups, part.kv_dim) != expected:  # a rank would keep the wrong part of them
                raise AdapterError(
                    f"adapter {folder}: layer {layer} {kind} has {part.groups} head groups and {part.kv_dim} "
                    f"channels, its settings {groups} and {expected[1]}; train the adapter again"
                )
        return LayerFactors(self.shard.factors(factors.k, groups), self.shard.factors(factors.v, groups))

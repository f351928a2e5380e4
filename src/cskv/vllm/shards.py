"""What a tensor-parallel rank keeps: rows of the up-projections for its kv heads, and the latents that these need.

Factors that all kv heads share need all latents on every rank. Replication takes the gain of tensor parallelism away:
a rank keeps `r_k + r_v` numbers a token where it would have kept `2 * kv_dim / ranks` uncompressed. Factors per head
group (`CSKVConfig.head_groups`) need only the latents of the groups whose heads are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from cskv.errors import ConfigError
from cskv.factorization.factors import Factors


@dataclass(frozen=True)
class Shard:
    """The kv heads of one tensor-parallel rank.

    Attributes:
        first, heads: its kv heads.
        of: kv heads of the model.
    """

    first: int
    heads: int
    of: int

    @classmethod
    def of_rank(cls, rank: int, ranks: int, kv_heads: int) -> Shard:
        """As vLLM deals kv heads out: evenly, or each to several ranks where there are fewer heads than ranks."""
        if kv_heads >= ranks:
            return cls(rank * (kv_heads // ranks), kv_heads // ranks, kv_heads)
        return cls(rank * kv_heads // ranks, 1, kv_heads)

    def groups(self, head_groups: int) -> range:
        """The head groups that any of its heads is in.

        Raises:
            ConfigError: heads do not split evenly into groups, or groups and ranks cut across each other.
        """
        per_group = self.of // head_groups
        if self.of % head_groups or (per_group % self.heads and self.heads % per_group):
            raise ConfigError(
                f"{head_groups} head groups of {self.of} kv heads cut across ranks of {self.heads}: "
                "give a number of groups and of ranks that divide each other"
            )
        last = self.first + self.heads - 1
        return range(self.first // per_group, last // per_group + 1)

    def rank_of(self, rank: int, head_groups: int) -> int:
        """Latents per token here, of `rank` in the model."""
        return rank // head_groups * len(self.groups(head_groups))

    def factors(self, factors: Factors, head_groups: int) -> Factors:
        """The part of a layer's factors that is kept here."""
        groups, head_dim = self.groups(head_groups), factors.kv_dim // self.of
        latents = slice(factors.rank // head_groups * groups.start, factors.rank // head_groups * (groups.stop))
        channels = slice(self.first * head_dim, (self.first + self.heads) * head_dim)
        return Factors(
            factors.down[latents],
            factors.up[channels],
            None if factors.bias is None else factors.bias[channels],
            None if factors.down_bias is None else factors.down_bias[latents],
        )

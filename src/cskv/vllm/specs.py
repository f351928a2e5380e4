"""The specs by which vLLM's block pool sizes our memory: pages of latents, and rings of exact tokens.

vLLM counts a page as `num_heads * num_states * state_content_size_bytes`; here it is one state of one head, of as many
bytes as `PageLayout` and `Ring` say. Specs are pickled between processes, so unpickling them must register nothing:
vLLM finds both by their base classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec

from cskv.latents.pages import PageLayout


@dataclass(frozen=True, kw_only=True)
class LatentSpec(FullAttentionSpec):
    """Latents of all tokens of one layer.

    Attributes:
        layout: of a page.
        window, group, sinks: see `CSKVConfig`.
    """

    layout: PageLayout
    window: int
    group: int
    sinks: int

    @property
    def state_content_size_bytes(self) -> int:
        return self.layout.page_bytes(self.block_size)

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Return 1: the page is not split."""
        return 1

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merge equal specs; others stay apart, with pages of their own sizes in one group."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("the pages of these layers differ")  # what vLLM expects to be told
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):
    """The rings of some layers, side by side in one page per request.

    Attributes:
        ring_bytes: of the page.
    """

    ring_bytes: int

    @property
    def state_content_size_bytes(self) -> int:
        return self.ring_bytes

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Return 1: the page is not split."""
        return 1

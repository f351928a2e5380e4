"""vLLM's attention backend: turns vLLM's batch into a `Step`, and passes a layer's tensors to `cskv.vllm.compute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import register_backend
from vllm.v1.kv_cache_layout import KVCacheLayout

from cskv.vllm.compute import attend, write
from cskv.vllm.step import Step, plan_step

NAME = "CSKV"


class Backend(AttentionBackend):
    """Attention on latents in pages."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Allow any size: a page is never split."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Put the pages of all layers side by side in a block: they may differ in size, as rings and latents do."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Return False: moving pages has not been tried."""
        return False


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the `Step` of a batch, once for all layers that share pages and settings."""

    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._spec = kv_cache_spec

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """Plan the step. Layers whose ranks differ have builders of their own, and share the result."""
        common, made = common_attn_metadata, getattr(common_attn_metadata, "_cskv_step", None)
        if made is None:
            lengths = common.seq_lens_cpu_upper_bound
            if lengths is None:
                lengths = common.seq_lens.cpu()
            made = plan_step(
                common.query_start_loc_cpu.numpy().astype("int64"),
                lengths.numpy().astype("int64"),
                common.block_table_tensor,
                common.slot_mapping,
                self._spec.block_size,
                window=self._spec.window,
                group=self._spec.group,
                sinks=self._spec.sinks,
            )
            common._cskv_step = made
        return made


class RingBackend(Backend):
    """The rings. They attend to nothing by themselves."""

    @staticmethod
    def get_name() -> str:
        return NAME + "_RING"

    @staticmethod
    def get_builder_cls() -> type[RingBuilder]:
        return RingBuilder


@dataclass
class RingPages:
    """(requests,): the page that holds each request's rings."""

    page: Tensor


class RingBuilder(AttentionMetadataBuilder[RingPages]):
    """Finds the rings of the batch's requests."""

    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # vLLM's is abstract

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RingPages:
        """Read the only column of the block table."""
        return RingPages(common_attn_metadata.block_table_tensor[:, 0].long())


class Impl(AttentionImpl):
    """Attends and writes."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *_: Any, **__: Any) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype = "auto"

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, then write the step's tokens into the cache.

        Args:
            layer: a `cskv.vllm.layer.CompressedAttention`.
            query: (tokens, q_heads, head_dim).
            key: (tokens, k_rank + v_rank): not keys, but the latents of both.
            value: (tokens, 2, kv_heads, head_dim): keys and values.
            kv_cache: unused: the layer has views of it.
            attn_metadata: None while vLLM measures memory; then nothing is done.
            output: (tokens, q_heads, head_dim), or with heads laid end to end.
            output_scale, output_block_scale: not supported.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention on latents gives no quantised output")
        if attn_metadata is None:
            torch.empty(layer.rebuilt_bytes, dtype=torch.uint8, device=query.device)  # so that it is measured
            return output.fill_(0)
        step, tokens = attn_metadata, attn_metadata.tokens
        cache = layer.cache()
        latents = key[:tokens].split([layer.layout.k_rank, layer.layout.v_rank], dim=-1)
        keys, values = value[:tokens].unbind(1)
        heads = output.view(-1, self.num_heads, self.head_size)
        attend(step, cache, layer.rules, query[:tokens], keys, values, heads)
        write(step, cache, keys, values, latents)
        return output


register_backend(NAME, f"{__name__}.{Backend.__name__}")
register_backend(NAME + "_RING", f"{__name__}.{RingBackend.__name__}")

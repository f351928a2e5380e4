"""The attention layer that replaces a vLLM model's own, and the rings of exact tokens beside it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.distributed.utils import get_pp_indices
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend

from cskv.attention.inputs import KeyOffset, Logits
from cskv.errors import UnsupportedModelError
from cskv.factorization.factors import LayerFactors
from cskv.latents.pages import Pages
from cskv.scratch import Scratch
from cskv.vllm.backend import Backend, RingBackend
from cskv.vllm.blocks import rings_of
from cskv.vllm.compute import LayerCache, LayerRules
from cskv.vllm.probe import find_rope
from cskv.vllm.shards import ServedShard
from cskv.vllm.specs import LatentSpec, RingSpec

REBUILT = 5  # tensors of all channels of all tokens that live at once while keys are rebuilt, rotated and joined
_scratch = Scratch()  # of all layers of a process; every thread has its own tensors in it


class CompressedAttention(Attention):
    """Attention on latents. Its parent hands it the layer's input (`stage`) before it calls it as any attention.

    Args:
        original: the layer that it stands in for; its name in vLLM's registry of layers is taken over.
        parent: vLLM's attention module, which owns it.
        forward: the parent's own forward.
        child: the name of the layer in its parent.
        share: this rank's share of the adapter.
        vllm_config: vLLM's configuration.
    """

    def __init__(
        self, original: Attention, parent: nn.Module, forward: Any, child: str, share: ServedShard, vllm_config: Any
    ) -> None:
        name = original.layer_name
        del vllm_config.compilation_config.static_forward_context[name]
        super().__init__(
            original.num_heads,
            original.head_size,
            original.impl.scale,
            num_kv_heads=original.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=original.quant_config,
            prefix=name,
            attn_backend=Backend,
        )
        self._parent = (parent, forward, child)  # in a tuple, or it would be a module of this one
        self.share, self.index = share, extract_layer_index(name)
        self.layout = share.layouts[self.index]
        self._softcap = getattr(original.impl, "logits_soft_cap", None) or None
        self._longest = vllm_config.model_config.max_model_len
        self._hidden_size = vllm_config.model_config.get_hidden_size()
        self._commuting = share.served.config.key_factors == "commuting"
        self.staged: list[tuple[Tensor, Tensor | None]] = []
        self.ring_layer = RingLayer(self, vllm_config) if share.served.has_ring else None
        self._pages: tuple[Pages, Pages] | None = None

    @property
    def rebuilt_bytes(self) -> int:
        """Peak bytes of rebuilt keys and values while a chunk of the longest prompt is prefilled."""
        channels = self.num_kv_heads * self.head_size
        return REBUILT * self._longest * channels * self.layout.dtype.itemsize

    def stage(self, hidden_states: Tensor, positions: Tensor) -> None:
        """Project the layer's input to latents; those of commuting keys are made from keys later, less a constant."""
        offset, constant = self.rules.offset, None
        if offset is not None:  # in fp32: it may be hundreds of times what varies
            rotation = offset.rotation
            cos, sin = rotation.cos[:, positions].float(), rotation.sin[:, positions].float()  # type: ignore[index]
            heads = rotation.heads(offset.constant.expand(1, len(positions), -1), cos, sin)
            constant = heads[0].transpose(0, 1).flatten(1)
        self.staged.append((linear(hidden_states, self.down, self.down_bias), constant))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend with queries, keys and values whose heads are laid end to end; return (tokens, q_heads * head_dim)."""
        latents, constant = self.staged.pop()
        if self._commuting:
            source = key if constant is None else (key.float() - constant).to(key.dtype)
            latents = torch.cat([linear(source, self.k_down), latents], dim=-1)
        tokens = query.shape[0]
        heads = (self.num_kv_heads, self.head_size)
        output = torch.empty(tokens, self.num_heads, self.head_size, dtype=query.dtype, device=query.device)
        torch.ops.vllm.unified_attention_with_output(
            query.view(tokens, self.num_heads, self.head_size),
            latents,
            torch.stack((key.view(tokens, *heads), value.view(tokens, *heads)), dim=1),
            output,
            _encode_layer_name(self.layer_name),
        )
        return output.view(tokens, -1)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Load the factors and probe how keys are normalised and rotated."""
        super().process_weights_after_loading(act_dtype)
        parent, forward, child = self._parent
        device = next(parent.parameters()).device
        own, rope, offset = self.share.factors(self.index), None, None
        probed = parent, forward, child, self._hidden_size, self.head_size, self.layout.dtype
        if not self._commuting:
            rope = find_rope(*probed)
        elif own.k.bias is not None:
            rotation = find_rope(*probed, alone=True)
            if rotation is None:
                raise UnsupportedModelError(f"{type(parent).__name__} does not rotate its keys; use joint key factors")
            offset = KeyOffset(rotation, own.k.bias.to(device, torch.float32))
            own = replace(own, k=replace(own.k, bias=None))
        factors = self._placed(own.to(device, self.layout.dtype))
        self.rules = LayerRules(factors, rope, Logits(self.impl.scale, self._softcap), _scratch, offset)

    def _placed(self, factors: LayerFactors) -> LayerFactors:
        """Join the down-projections that read the layer's input into one product, of which the factors hold views."""
        parts = [factors.v] if self._commuting else [factors.k, factors.v]
        bias = None
        if any(part.down_bias is not None for part in parts):
            zeros = (part.down.new_zeros(part.rank) for part in parts)
            bias = torch.cat([z if part.down_bias is None else part.down_bias for z, part in zip(zeros, parts)])
        self.register_buffer("down", torch.cat([part.down for part in parts]), persistent=False)
        self.register_buffer("down_bias", bias, persistent=False)
        self.register_buffer("k_down", factors.k.down if self._commuting else None, persistent=False)
        k = factors.k if self._commuting else replace(factors.k, down=self.down[: factors.k.rank])
        v = replace(factors.v, down=self.down[-factors.v.rank :])
        return LayerFactors(k.aligned(16) if k.up.is_cuda else k, v)

    def get_kv_cache_spec(self, vllm_config: Any) -> LatentSpec:
        """Describe the pages of latents."""
        self._block_size = vllm_config.cache_config.block_size
        config = self.share.served.config
        return LatentSpec(
            block_size=self._block_size,
            num_kv_heads=1,
            head_size=self.layout.k_rank,
            head_size_v=self.layout.v_rank,
            dtype=torch.uint8,
            max_tp_shards=self.share.shard.total_heads if config.head_groups > 1 else 1,
            layout=self.layout,
            window=config.window,
            group=config.group,
            sinks=config.sinks,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Bind the allocated memory, (pages, 1, 1, page_bytes)."""
        super().bind_kv_cache(kv_cache)
        self._pages = self.layout.pages(kv_cache[:, 0, 0], self._block_size)

    def cache(self) -> LayerCache:
        """Return the layer's memory, with the ring pages of the step's requests."""
        k, v = self._pages  # type: ignore[misc]
        if self.ring_layer is None:
            return LayerCache(k, v)
        metadata: Any = get_forward_context().attn_metadata
        page = metadata[self.ring_layer.page_name].page
        return LayerCache(k, v, self.ring_layer.ring, self.ring_layer.rings, page)


class RingLayer(nn.Module, AttentionLayerBase):
    """The rings of one layer. As many layers as fit share a block; the first of them requests it for all."""

    def __init__(self, layer: CompressedAttention, vllm_config: Any) -> None:
        super().__init__()
        self.ring = layer.share.rings[layer.index]
        self.layer_name = f"{layer.layer_name}.ring"
        self.page_name = self.layer_name
        self.rings: Tensor | None = None
        self._share = layer.share
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[self.layer_name] = self

    def get_kv_cache_spec(self, vllm_config: Any) -> RingSpec | None:
        """Describe the page of a bundle's rings; None unless this layer is the bundle's first."""
        bundle = self._bundle(vllm_config)
        self.page_name = bundle[0].layer_name
        if bundle[0] is not self:
            return None
        return RingSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.ring.head_dim,
            dtype=torch.uint8,
            ring_bytes=self._cut.page_bytes,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Bind the allocated memory, (pages, 1, 1, bytes), for all layers that share it."""
        self.kv_cache = kv_cache
        for place, other in enumerate(self._members):
            start = place * self._cut.ring_bytes
            other.rings = other.ring.rings(kv_cache[:, 0, 0, start : start + other.ring.page_bytes])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend of rings, which have metadata of their own."""
        return RingBackend

    def _bundle(self, vllm_config: Any) -> list[RingLayer]:
        """Return the layers whose rings share a page with this one's."""
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        stages = vllm_config.parallel_config.pipeline_parallel_size
        counts = [stop - start for start, stop in (get_pp_indices(layers, i, stages) for i in range(stages))]
        self._cut = rings_of(self._share, vllm_config.cache_config.block_size, counts)
        context = vllm_config.compilation_config.static_forward_context
        here = [other for other in context.values() if isinstance(other, RingLayer)]
        bounds = self._cut.bounds(len(here))
        self._members = next(here[start:stop] for start, stop in pairwise(bounds) if start <= here.index(self) < stop)
        return self._members

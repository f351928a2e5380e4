"""Adapters of models that are not there: their settings, and folders of random factors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cskv import BaseModelInfo, CSKVAdapter, CSKVConfig
from cskv.adapter.folder import Settings, Widths
from cskv.factorization.factors import Factors, LayerFactors
from cskv.vllm.served import Served

HEADS, HEAD_DIM, HIDDEN = 4, 8, 24
KV_DIM = HEADS * HEAD_DIM
Ranks = list[tuple[int, int]]  # of keys and values, layer by layer


def served(
    config: CSKVConfig, ranks: Ranks, *, heads: int = HEADS, widths: dict[tuple[int, str], Widths] | None = None
) -> Served:
    """An adapter's settings alone; its folder is not there."""
    base = BaseModelInfo("someone/base", "llama", HIDDEN, len(ranks))
    of = {i: {"k": k, "v": v, "kv_dim": heads * HEAD_DIM} for i, (k, v) in enumerate(ranks)}
    return Served(Path("nowhere"), Settings(config, base, of, {}, widths or {}))


def save(folder: Path, config: CSKVConfig, ranks: Ranks, **widths: Any) -> CSKVAdapter:
    """A folder of random factors of a model with 4 kv heads of 8 channels."""
    generator = torch.Generator().manual_seed(0)

    def factors(rank: int) -> Factors:
        sizes = (rank, HIDDEN), (KV_DIM, rank // config.head_groups), (KV_DIM,)
        return Factors(*(torch.randn(size, generator=generator) for size in sizes))

    layers = {i: LayerFactors(factors(k), factors(v)) for i, (k, v) in enumerate(ranks)}
    adapter = CSKVAdapter(config, layers, BaseModelInfo("someone/base", "llama", HIDDEN, len(ranks)), **widths)
    adapter.save_pretrained(folder)
    return adapter


def vllm_config(
    *,
    heads: int = HEADS,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    text: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    **others: Any,
) -> Any:
    """What our code reads of vLLM's configuration, of a model with heads of 8 channels."""
    values = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
    }
    ranks = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    blocks = {
        "cache_dtype": "auto",
        "enable_prefix_caching": True,
        "block_size": 16,
        "user_specified_block_size": False,
        "DEFAULT_BLOCK_SIZE": 16,
    }
    made: dict[str, Any] = {
        "model_config": SimpleNamespace(
            hf_text_config=SimpleNamespace(**values | (text or {})),
            dtype=dtype,
            get_total_num_kv_heads=lambda: heads,
            get_head_size=lambda: HEAD_DIM,
        ),
        "parallel_config": SimpleNamespace(**ranks | (parallel or {})),
        "cache_config": SimpleNamespace(**blocks | (cache or {})),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**made | others)

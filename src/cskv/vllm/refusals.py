"""Refusals of what is not served, before anything is loaded.

A compressed cache must not answer wrongly, and must not cost more than it saves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from cskv.adapter.base_model import BaseModelInfo
from cskv.errors import AdapterError, ConfigError, UnsupportedModelError
from cskv.vllm.served import NO_RING, Served, exact_tokens
from cskv.vllm.shards import ServedShard

logger = logging.getLogger("vllm.cskv")

LITTLE = 0.75  # of the saving on one rank: below that a warning says what tensor parallelism costs


def check(served: Served, vllm_config: Any) -> None:
    """Refuse what cannot be served, and switch off what would be wrong.

    Args:
        served: the adapter.
        vllm_config: vLLM's whole configuration. Prefix caching is switched off where tokens are kept exactly.

    Raises:
        AdapterError: the adapter was made for another model, or is damaged.
        UnsupportedModelError: the model has layers that are not compressed.
        ConfigError: an option of vLLM's, or the number of ranks, does not go with the compressed cache.
    """
    model = vllm_config.model_config.hf_text_config
    _check_model(served, model)
    for reason in _unsupported_options(served, vllm_config):
        raise ConfigError(f"a compressed cache cannot be served {reason}")
    ranks = vllm_config.parallel_config.tensor_parallel_size
    here, alone = (ServedShard.of_rank(served, vllm_config.model_config, 0, n) for n in (ranks, 1))
    _check_saving(ranks, _saving(here), _saving(alone))
    for layer in alone.layouts:  # damage that a worker finds later is reported by two tracebacks, of two processes
        alone.factors(layer)
    cache = vllm_config.cache_config
    if served.has_ring and cache.enable_prefix_caching:
        cache.enable_prefix_caching = False
        logger.warning(
            "prefix caching is switched off: %s tokens of a request are kept exactly, and a shared prefix has only "
            "latents; serve with %s to have prefix caching",
            exact_tokens(served.config.window, served.config.group, served.config.sinks),
            NO_RING,
        )


def _check_model(served: Served, model: Any) -> None:
    remedy = "serve the base model that it names"
    served.settings.base.check_same(BaseModelInfo.from_config(model), f"adapter {served.folder} was made for", remedy)
    missing = sorted(set(range(model.num_hidden_layers)) - set(served.settings.ranks))
    if missing:
        raise UnsupportedModelError(
            f"the adapter leaves layers {missing} uncompressed, and a mixture is not served; compress every layer"
        )
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    for layer, ranks in served.settings.ranks.items():
        if ranks["kv_dim"] != heads * head_dim:
            raise AdapterError(
                f"adapter {served.folder}: layer {layer} has {ranks['kv_dim']} channels, this model "
                f"{heads * head_dim}; {remedy}"
            )


def _unsupported_options(served: Served, vllm_config: Any) -> Iterator[str]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if vllm_config.speculative_config is not None:
        yield "with speculative decoding: tokens that are taken back may be sealed already"
    if vllm_config.lora_config is not None:
        yield "with LoRA: latents are those of the base model's projections"
    if vllm_config.kv_transfer_config is not None:
        yield "with a KV connector: moving its pages has not been tried"
    if cache.cache_dtype != "auto":
        yield f"with kv_cache_dtype {cache.cache_dtype!r}: bits per latent are the adapter's; leave it at 'auto'"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"with {name} {getattr(parallel, name)}: a request's pages are not split over ranks"
    if parallel.tensor_parallel_size > 1 and served.config.key_factors == "commuting":
        yield (
            f"with commuting key factors on {parallel.tensor_parallel_size} tensor-parallel ranks: they mix all kv "
            "heads, and a rank has only its own; use one rank, pipeline parallelism, or joint factors"
        )
    if served.has_ring and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield f"with exact tokens and without the hybrid KV cache manager; leave that on, or serve with {NO_RING}"


def _check_saving(ranks: int, here: float, alone: float) -> None:
    """Refuse tensor parallelism that makes the cache larger; warn where it takes much of the saving away."""
    remedy = "train factors per head group (--head-groups, a multiple of the ranks), or use pipeline parallelism"
    if ranks > 1 and here < 1:
        raise ConfigError(
            f"on {ranks} tensor-parallel ranks the latents, which every rank repeats, take {1 / here:.2f} times the "
            f"bytes of the uncompressed cache; {remedy}"
        )
    if here < LITTLE * alone:
        logger.warning(
            "on %d tensor-parallel ranks, which repeat the latents, the cache is %.1f times smaller, not %.1f; %s",
            ranks,
            here,
            alone,
            remedy,
        )


def _saving(share: ServedShard) -> float:
    """Divide the bytes of a rank's uncompressed cache by those of its latents, exact tokens aside."""
    full = 2 * share.shard.heads * share.head_dim * share.dtype.itemsize * len(share.layouts)
    return full / sum(layout.bytes_per_token for layout in share.layouts.values())

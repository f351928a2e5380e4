"""Tiny random models of the families that the generic path covers. fp32, on the CPU, fixed seeds."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import cskv
from cskv.models.sites import find_sites
from cskv.models.survey import survey

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + 0.25 * i for i in range(8)],
}
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 6,
    "sliding_window": 12,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "global_head_dim": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-dynamic-rope": (
        "Llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"num_hidden_layers": 4, "sliding_window": 12, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", {"num_hidden_layers": 6, "sliding_window": 12, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "olmo2": ("Olmo2", {}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),
    "granite": ("Granite", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "glm4": ("Glm4", {}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 12}),
    "gpt-oss": (
        "GptOss",
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma4": ("Gemma4Text", GEMMA4),
}
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-shared": ("Gemma4Text", GEMMA4 | {"num_hidden_layers": 12, "num_kv_shared_layers": 6}),
}
for _families in (FAMILIES, UNUSUAL):  # older releases lack some
    for _name in [name for name, (kind, _) in _families.items() if not hasattr(transformers, f"{kind}Config")]:
        del _families[_name]


def tiny_model(family: str, **changes: Any) -> nn.Module:
    """A random model whose norms and biases are random too, so that a forgotten one shows."""
    name, special = (FAMILIES | UNUSUAL)[family]
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**(SHAPE | special | changes))).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 0.0 if parameter_name.endswith("bias") else parameter.data
            parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def full_rank_adapter(model: nn.Module, config: cskv.CSKVConfig) -> cskv.CSKVAdapter:
    """Factors that lose nothing: up @ down is the weight, with latents in a random basis of full rank."""
    layers = {}
    generator = torch.Generator().manual_seed(2)
    for site in find_sites(model):
        pair = []
        for projection in (site.k, site.v):
            basis, _ = torch.linalg.qr(torch.randn(site.kv_dim, site.kv_dim, generator=generator, dtype=torch.float64))
            down = (basis.T @ projection.weight.detach().double()).float()
            bias = None if projection.bias is None else projection.bias.detach().clone()
            pair.append(cskv.Factors(down, basis.float(), bias))
        layers[site.layer_idx] = cskv.LayerFactors(*pair)
    return cskv.CSKVAdapter(config, layers, survey(model).base)


def truncated_adapter(model: nn.Module, config: cskv.CSKVConfig) -> cskv.CSKVAdapter:
    """Factors of the ranks that `config` asks for: the first directions of the full-rank ones."""
    full = full_rank_adapter(model, config)
    layers = {}
    for site in find_sites(model):
        factors = full.factors(site.layer_idx)
        cut = [
            cskv.Factors(f.down[:rank].detach().clone(), f.up[:, :rank].detach().clone(), f.bias)
            for f, rank in ((factors.k, config.k_rank(site.kv_dim)), (factors.v, config.v_rank(site.kv_dim)))
        ]
        layers[site.layer_idx] = cskv.LayerFactors(*cut)
    return cskv.CSKVAdapter(config, layers, full.base)

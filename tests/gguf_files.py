"""Tiny Llamas in GGUF files, written by the package gguf as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cli.support import byte_tokenizer

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
LAYERS, HIDDEN, HEADS, KV_HEADS = 2, 64, 4, 2
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama of 2 layers and 32 key and value channels, in fp32."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 258,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **changes)).eval()


def dequantised(weight: Tensor, kind: str) -> Tensor:
    """What is left of a matrix in that form, in fp32."""
    form = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.detach().numpy(), form), form))


def quantise_(model: LlamaForCausalLM, kind: str) -> LlamaForCausalLM:
    """Replace all matrices by what a file in that form holds of them."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = dequantised(parameter, kind)
    return model


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "Q8_0",
    *,
    architecture: str = "llama",
    without: str = "",
    extra: dict[str, np.ndarray] | None = None,
    **values: Any,
) -> Path:
    """Write a model with a tokenizer of one token per byte, and a chat template.

    Args:
        path: the file.
        model: as `tiny_llama` makes it.
        kind: of the matrices, `Q4_0`, `Q8_0` or `F16`; norms are fp32.
        architecture: what the file says that it is.
        without: name of a tensor that is left out.
        extra: more tensors.
        values: more metadata, dots spelt as `__`.
    """
    config, form = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    for name, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add = writer.add_uint16 if isinstance(value, int) else add
        add(name.replace("__", "."), value)
    _add_tokenizer(writer)
    for name, tensor in _tensors(model).items():
        if name == without:
            continue
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.numpy())
        else:
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), form), raw_dtype=form)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = byte_tokenizer()
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    words = ["th", *words] if len(words) < 258 else words  # an empty list of merges cannot be written
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if word == "<end>" else gguf.TokenType.NORMAL for word in words])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(words.index("<end>"))
    writer.add_pad_token_id(words.index("<end>"))
    writer.add_chat_template(TEMPLATE)


def _tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """All weights under llama.cpp's names."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    found = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    for layer in range(LAYERS):
        for ours, theirs in (NAMES | NORMS).items():
            tensor = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(ours)
            found[f"blk.{layer}.{ours}.weight"] = tensor if heads is None else _interleaved(tensor, heads)
    return found


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Order a head's channels as llama.cpp's Llama turns them: those that RoPE pairs beside each other."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()

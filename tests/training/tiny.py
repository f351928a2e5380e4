"""A tiny random base model, token samples and an untrained adapter for the training tests."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from cskv.adapter.adapter import CSKVAdapter
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig


def tiny_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Two layers, hidden size 16, kv_dim 8, with key and value biases; the same weights each time."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        attention_dropout=0.5,  # a model left in training mode would give other layer inputs each time
        initializer_range=0.5,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.to(dtype).train()


def token_samples(number: int, length: int = 16) -> list[Tensor]:
    return list(torch.randint(3, 40, (number, length), generator=torch.Generator().manual_seed(1)))


def untrained(model: PreTrainedModel, density: float = 0.5) -> CSKVAdapter:
    return initialise(model, CSKVConfig(k_density=density, v_density=density, init="svd"))


def factors_of(adapter: CSKVAdapter) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}

"""vLLM's own model classes with their attention layers exchanged: `CSKVLlamaForCausalLM` is vLLM's `LlamaForCausalLM`.

No modelling code is copied. A class is made when vLLM asks for it by name. After the model was built as usual, every
attention layer in it is replaced, and its parent made to hand over the layer's input first.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from typing import Any, cast

from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

from cskv.errors import UnsupportedModelError
from cskv.vllm.architectures import PREFIX
from cskv.vllm.layer import CompressedAttention
from cskv.vllm.served import find_served
from cskv.vllm.shards import ServedShard


class Compressed:
    """Mixin for a model class of vLLM's: exchanges the attention layers.

    Raises:
        UnsupportedModelError: there is none, or one that is not served.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config, model = vllm_config.model_config, cast(nn.Module, self)
        served = find_served(config.model, config.revision, config.hf_config)
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        share = ServedShard.of_rank(served, config, rank, ranks)
        found = [
            (parent, name, layer)
            for parent in model.modules()
            for name, layer in parent.named_children()
            if isinstance(layer, Attention)
        ]
        if not found:
            raise UnsupportedModelError(
                f"{type(self).__name__} has no attention layer of the usual kind; it is not served"
            )
        for parent, name, layer in found:
            _refuse(parent, layer)
            cls: Any = type(parent)
            setattr(parent, name, CompressedAttention(layer, parent, cls.forward, name, share, vllm_config))
            parent.__class__ = _staging(cls, name)


@cache
def _staging(cls: Any, child: str) -> Any:
    """Derive a module class that hands its input to its attention layer first."""
    names = list(inspect.signature(cls.forward).parameters)[1:]  # without self

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args)) | kwargs
        getattr(self, child).stage(given["hidden_states"], given["positions"])
        return cls.forward(self, *args, **kwargs)

    return type(f"Compressed{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})


def _refuse(parent: nn.Module, layer: Attention) -> None:
    reason = None
    if "hidden_states" not in inspect.signature(type(parent).forward).parameters or not hasattr(parent, "qkv_proj"):
        reason = "has no fused qkv_proj of its hidden_states"
    elif not hasattr(parent, "q_size"):
        reason = "does not say how many of its channels are queries"
    elif layer.sliding_window is not None:
        reason = "has a sliding window, and such layers are not compressed"
    elif layer.has_sink:
        reason = "has learned attention sinks"
    if reason is not None:
        raise UnsupportedModelError(f"{layer.layer_name} ({type(parent).__name__}) {reason}; this model is not served")


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in _TEXT_GENERATION_MODELS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, cls = _TEXT_GENERATION_MODELS[architecture]
    base = getattr(import_module(module if "." in module else f"vllm.model_executor.models.{module}"), cls)
    made = type(name, (Compressed, base), {"__module__": __name__, "__doc__": f"{architecture}, cache compressed."})
    globals()[name] = made
    return made

"""`AutoModelForCausalLM.from_pretrained(adapter_folder)`: the base model with its compressor attached.

The classes are registered with transformers by `import cskv`; they are shells, and no model is ever of their type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cskv.adapter.adapter import CSKVAdapter
from cskv.adapter.folder import MODEL_TYPE
from cskv.attachment.attach import attach
from cskv.errors import AdapterError

_HUB_KEYS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class CSKVAdapterConfig(PretrainedConfig):
    """An adapter folder's `config.json` as transformers reads it."""

    model_type = MODEL_TYPE


class CSKVForCausalLM(PreTrainedModel):
    """What `AutoModelForCausalLM` finds for an adapter folder. Its `from_pretrained` returns the base model instead."""

    config_class = CSKVAdapterConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Load the base model that the adapter names, and attach the adapter to it.

        Args:
            pretrained_model_name_or_path: the adapter's folder or hub id.
            model_args: for the base model's `from_pretrained`.
            config: the adapter's config, which transformers has read already. Some releases move `dtype` from the
                arguments to it; nothing else of it is used.
            kwargs: for the base model's `from_pretrained` (dtype, device_map, ...). Hub arguments go to both.

        Raises:
            AdapterError: the adapter is damaged, or names no base model.
        """
        kwargs.pop("adapter_kwargs", None)
        hub = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
        kwargs.pop("revision", None)
        if getattr(config, "dtype", None) is not None:
            kwargs.setdefault("dtype", config.dtype)
        adapter = CSKVAdapter.from_pretrained(pretrained_model_name_or_path, **hub)
        if not adapter.base.name:
            raise AdapterError(
                f"{pretrained_model_name_or_path} does not name its base model; load the base and call cskv.attach"
            )
        model = AutoModelForCausalLM.from_pretrained(
            adapter.base.name, *model_args, revision=adapter.base.revision or "main", **kwargs
        )
        attach(model, adapter)
        return model


def register() -> None:
    """Tell transformers' auto classes about adapter folders. Doing it twice does nothing more."""
    AutoConfig.register(MODEL_TYPE, CSKVAdapterConfig, exist_ok=True)
    AutoModelForCausalLM.register(CSKVAdapterConfig, CSKVForCausalLM, exist_ok=True)

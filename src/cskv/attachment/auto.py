"""`AutoModelForCausalLM.from_pretrained(adapter_folder)`: the base model with its compressor attached.

The classes are registered with transformers by `import cskv` (`registration`); they are shells, and no model is ever of
their type. transformers is in the middle of its own imports when this module is imported, so that little may be needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PretrainedConfig

from cskv.adapter.folder import MODEL_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_KEYS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class CSKVAdapterConfig(PretrainedConfig):
    """An adapter folder's `config.json` as transformers reads it."""

    model_type = MODEL_TYPE


class CSKVForCausalLM:
    """The class that `AutoModelForCausalLM` finds for an adapter folder; it loads the base model instead."""

    config_class = CSKVAdapterConfig

    @classmethod
    def from_pretrained(
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
            CSKVError: its base is a GGUF file that is missing, damaged or not supported.
        """
        from transformers import AutoModelForCausalLM

        from cskv.adapter.adapter import CSKVAdapter
        from cskv.attachment.attach import attach
        from cskv.models.gguf import checkpoint_name, is_gguf, load_gguf

        kwargs.pop("adapter_kwargs", None)
        hub = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
        kwargs.pop("revision", None)
        if getattr(config, "dtype", None) is not None:
            kwargs.setdefault("dtype", config.dtype)
        adapter = CSKVAdapter.from_pretrained(pretrained_model_name_or_path, **hub)
        base = checkpoint_name(adapter.base.path())
        load = load_gguf if is_gguf(base) else AutoModelForCausalLM.from_pretrained
        model = load(base, *model_args, revision=adapter.base.revision or "main", **kwargs)
        attach(model, adapter)
        return model

"""The names under which vLLM finds compressed models, and what it checks before it builds one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cskv.errors import ConfigError, CSKVError

PREFIX = "CSKV"


def register() -> None:
    """Tell vLLM about every text model's compressed twin. Called in each of its processes; nothing is loaded."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, ModelRegistry

    for architecture in _TEXT_GENERATION_MODELS:
        name = PREFIX + architecture
        base: Any = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if name not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(name, f"cskv.vllm.model:{name}")
            MODELS_CONFIG_MAP[name] = type(f"{name}Config", (_Checked, base), {})


class _Checked:
    """Mixin for vLLM's checks of an architecture: adds those of the adapter and the options."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        super().verify_and_update_config(vllm_config)  # type: ignore[misc]
        try:
            _check(vllm_config)
        except CSKVError as error:
            if _is_server():
                sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
                raise SystemExit(2) from None
            raise


def _check(vllm_config: Any) -> None:
    from cskv.vllm.blocks import choose_block_size
    from cskv.vllm.refusals import check
    from cskv.vllm.served import find_served
    from cskv.vllm.shards import ServedShard

    model = vllm_config.model_config
    served = find_served(model.model, model.revision, model.hf_config)
    check(served, vllm_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    choose_block_size(ServedShard.of_rank(served, model, 0, ranks), vllm_config)
    # What is compiled depends on ranks and settings: they are part of the key under which vLLM caches it.
    more = vllm_config.additional_config or {}
    if not isinstance(more, dict):
        raise ConfigError(f"additional_config is {type(more).__name__}; expected a JSON object, or none")
    vllm_config.additional_config = {**more, "cskv": served.summary()}


def _is_server() -> bool:
    """Tell whether this process is vLLM's command line, whose user wants one line and no traceback."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.startswith("vllm.entrypoints"))

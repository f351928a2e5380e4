"""Registration of the adapter format with transformers' auto classes, without importing transformers for it.

The auto classes know adapter folders from the moment when they can be used: at once where their modules are loaded
already, else when these modules are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Make transformers' auto classes know adapter folders, now or when they are imported. Repeating it is harmless."""
    for name, function in _FUNCTIONS.items():
        if name in sys.modules:
            function()
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from cskv.attachment.auto import CSKVAdapterConfig

    AutoConfig.register(CSKVAdapterConfig.model_type, CSKVAdapterConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from cskv.attachment.auto import CSKVAdapterConfig, CSKVForCausalLM

    AutoModelForCausalLM.register(CSKVAdapterConfig, CSKVForCausalLM, exist_ok=True)


_FUNCTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _Finder:
    """Finds the modules of the auto classes where the other finders do, and calls our function once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        function = _FUNCTIONS.get(fullname)
        if function is None:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                function()

            # On this loader alone: another one in its place would cost the module its source and resources.
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()

"""A plugin of vLLM: its block pool holds latents, many times as many tokens as before (docs/vllm.md).

vLLM calls `register` in each of its processes. Importing this loads neither vLLM nor torch.
"""

from __future__ import annotations


def register() -> None:
    """The entry point, `vllm.general_plugins`. Calling it again does nothing more."""
    from cskv.vllm.architectures import register as register_architectures

    register_architectures()

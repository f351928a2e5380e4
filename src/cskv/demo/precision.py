"""In which dtype a bf16 checkpoint runs at a bearable speed here."""

from __future__ import annotations

import torch


def fast_dtype() -> str:
    """Return "auto", the checkpoint's own dtype, or "float32" on a CPU that would emulate bf16, many times slower."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return "auto"
    has_kernels = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "auto" if has_kernels else "float32"

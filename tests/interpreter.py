"""Triton's interpreter, which runs kernels on the CPU where there is no GPU."""

from __future__ import annotations

from functools import wraps
from typing import Any


def mend_interpreter() -> None:
    """Let loops run to bounds that are computed: Triton 3.6 holds them as arrays of one number, and NumPy 2.4 refuses
    to take such an array for a number.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if hasattr(patch, "__wrapped__"):
        return

    @wraps(patch)
    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended

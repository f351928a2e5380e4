"""The one way into attention: it picks a backend, and says so once where a backend cannot do what is asked."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.attention import reference, tiled
from cskv.attention.inputs import AttentionInputs
from cskv.errors import ConfigError
from cskv.scratch import Scratch

BACKENDS = ("triton", "torch", "reference")
AUTO = "auto"


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"],
    inputs: AttentionInputs,
    *,
    backend: str = AUTO,
    scratch: Scratch | None = None,
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Attend to sealed tokens by their latents, and to the newest exactly.

    The latents' dtype is the one that is computed in, under autocast too (sums are fp32; the reference computes in fp32
    whatever it is given): it is that of the longest operand. The query, exact tokens and factors are converted to it.

    Args:
        query: after norm and RoPE. Query heads that share a kv head follow one another.
        inputs: what it reads and is told.
        backend: "auto" (Triton on a GPU where it is installed, else torch), "triton" (torch, with a warning, where the
            kernels cannot do it), "torch" or "reference".
        scratch: scratch tensors to use again from step to step.

    Returns:
        The output of every head, in the query's dtype.

    Raises:
        ConfigError: an unknown backend.
    """
    if backend != AUTO and backend not in BACKENDS:
        check_backend(backend)
    view, dtype = inputs.view, query.dtype
    if backend == "reference":
        return reference.attention(query, inputs).to(dtype)
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):
            return attention(query, inputs, backend=backend, scratch=scratch)
    computed = dtype if view.k is None else view.k.dtype
    if not computed == dtype == view.keys.dtype == view.values.dtype == inputs.factors.k.up.dtype:
        query, inputs = query.to(computed), inputs.to(computed)
    if backend == "triton" or (backend == AUTO and query.is_cuda):
        from cskv.attention.triton import launch

        reason = launch.refusal(query, inputs)
        if reason is None:
            return launch.attention(query, inputs).to(dtype)
        _say_once(reason)
    return tiled.attention(query, inputs, scratch).to(dtype)


def check_backend(backend: str, *others: str) -> None:
    """Raise ConfigError for a name that is none of "auto", `BACKENDS` and `others`."""
    known = (AUTO, *BACKENDS, *others)
    if backend not in known:
        raise ConfigError(f"attention is {backend!r}; expected one of {', '.join(known)}")


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"attention on the compressed cache by torch, not triton: {reason}", stacklevel=3)

"""The one way into attention: it picks a backend, and says so once where a backend cannot do what is asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial

from jaxtyping import Float
from torch import Tensor

from cskv.attention import reference, tiled
from cskv.attention.inputs import AttentionInputs
from cskv.errors import ConfigError
from cskv.scratch import Scratch

BACKENDS = ("triton", "torch", "reference")  # in the order in which one falls back to the next
AUTO = "auto"


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"],
    inputs: AttentionInputs,
    *,
    backend: str = AUTO,
    scratch: Scratch | None = None,
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Attend to sealed tokens by their latents, and to the newest exactly.

    Args:
        query: after norm and RoPE. Query heads that share a kv head follow one another.
        inputs: what it reads and is told.
        backend: "auto" (Triton on a GPU where it is installed, else torch), "triton", "torch" or "reference".
        scratch: scratch tensors to use again from step to step.

    Returns:
        The output of every head, in the query's dtype.

    Raises:
        ConfigError: an unknown backend.
    """
    for name in _candidates(backend, query):
        function, refusal = _backend(name, scratch)
        reason = refusal(query, inputs)
        if reason is None:
            return function(query, inputs).to(query.dtype)
        _say_once(name, reason)
    raise AssertionError("the reference refuses nothing")


def check_backend(backend: str, *others: str) -> None:
    """Raises ConfigError for a name that is none of "auto", `BACKENDS` and `others`."""
    known = (AUTO, *BACKENDS, *others)
    if backend not in known:
        raise ConfigError(f"attention is {backend!r}; expected one of {', '.join(known)}")


def _candidates(backend: str, query: Tensor) -> tuple[str, ...]:
    check_backend(backend)
    if backend == AUTO:
        backend = "triton" if query.is_cuda else "torch"
    return BACKENDS[BACKENDS.index(backend) :]


def _backend(name: str, scratch: Scratch | None) -> tuple[Callable[..., Tensor], Callable[..., str | None]]:
    if name == "triton":
        from cskv.attention.triton import launch

        return launch.attention, launch.refusal
    if name == "torch":
        return partial(tiled.attention, scratch=scratch), lambda *_: None
    return reference.attention, lambda *_: None


@cache
def _say_once(name: str, reason: str) -> None:
    following = BACKENDS[BACKENDS.index(name) + 1]
    warnings.warn(f"attention on the compressed cache by {following}, not {name}: {reason}", stacklevel=4)

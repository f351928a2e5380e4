"""The one way into attention: it picks a backend, and says so once where a backend cannot do what is asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial

from jaxtyping import Float
from torch import Tensor

from cskv.attention import reference, tiled
from cskv.attention.inputs import Logits, Rotation, ToHeads
from cskv.errors import ConfigError
from cskv.factorization.factors import LayerFactors
from cskv.latents.view import View
from cskv.scratch import Scratch

BACKENDS = ("triton", "torch", "reference")  # in the order in which one falls back to the next
AUTO = "auto"


def attention(
    query: Float[Tensor, "batch q_heads new head_dim"],
    view: View,
    factors: LayerFactors,
    rope: Rotation | None,
    logits: Logits,
    *,
    value_heads: ToHeads | None = None,
    backend: str = AUTO,
    scratch: Scratch | None = None,
) -> Float[Tensor, "batch q_heads new head_dim"]:
    """Attend to sealed tokens by their latents, and to the newest exactly.

    Args:
        query: after norm and RoPE. Query heads that share a kv head follow one another.
        view: what is read.
        factors: of the layer, in the query's dtype and on its device.
        rope: how rebuilt keys are normalised and rotated. None where they are not, or were before they became latents
            (commuting factors): then the up-projection is absorbed into the query.
        logits: scaling, soft-capping, mask and sinks.
        value_heads: from rebuilt channels, (batch, tokens, kv_dim), to values, (batch, kv_heads, tokens, head_dim),
            where a family normalises values. None absorbs the up-projection.
        backend: "auto" (Triton on a GPU where it is installed, else torch), "triton", "torch" or "reference".
        scratch: scratch tensors to use again from step to step.

    Returns:
        The output of every head, in the query's dtype.

    Raises:
        ConfigError: an unknown backend.
    """
    for name in _candidates(backend, query):
        function, refusal = _backend(name, scratch)
        reason = refusal(query, view, factors, rope, logits, value_heads)
        if reason is None:
            return function(query, view, factors, rope, logits, value_heads).to(query.dtype)
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

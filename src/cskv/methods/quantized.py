"""transformers' own quantised cache.

`QuantizedCache` quantises the whole prompt after its prefill, the newest tokens too. Tokens that come later stay exact
until there are `residual_length` of them; then all are dequantised and quantised again together.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, QuantizedCache

from cskv.errors import CacheError, CSKVError
from cskv.methods.method import Method, NewCache
from cskv.models.placement import device_of

PACKED_TOKENS = 8  # of any kv_dim that is a multiple of 32, so many make whole groups of 64 to pack in 2 bits


@dataclass(frozen=True)
class Backend:
    """A package that transformers can quantise its cache with."""

    module: str
    package: str  # its name in a package index
    axis: int  # makes groups of consecutive channels of a token, as transformers advises
    bits: tuple[int, ...]  # hqq's 3 bits unpack matrices alone


BACKENDS = {
    "hqq": Backend("hqq", "hqq", 1, (1, 2, 4, 8)),
    "quanto": Backend("optimum.quanto", "optimum-quanto", 0, (2, 4)),
}


def quantized_cache(
    model: PreTrainedModel,
    backend: str = "hqq",
    *,
    nbits: int = 4,
    q_group_size: int = 64,
    residual_length: int = 128,
) -> QuantizedCache:
    """Make an empty cache, for one batch: `functools.partial(quantized_cache, model, nbits=2)` makes fresh ones.

    Args:
        model: a decoder, not attached, whose layers all cache every token.
        backend: "hqq", or "quanto", which compiles a C++ kernel when it is first used.
        nbits: bits per number: 2 or 4, and with hqq also 1 or 8 (its 3 bits unpack matrices, and no cache).
        q_group_size: numbers that share a scale and a zero point. The cached keys have to make whole groups, and with
            hqq a multiple of 8 / nbits groups, which is why `quantized` pads prompts: kv_heads * head_dim may be 192.
        residual_length: tokens after the prompt that are kept exactly before they are quantised.

    Raises:
        CSKVError: the backend is unknown or has no such bits, its package is missing, or its kernel cannot be built.
        CacheError: transformers refuses the settings or the model.
    """
    known = _backend(backend, nbits)
    if backend == "quanto":
        _build_kernel(device_of(model))
    try:
        return QuantizedCache(
            backend=backend,
            config=model.config,
            nbits=nbits,
            axis_key=known.axis,
            axis_value=known.axis,
            q_group_size=q_group_size,
            residual_length=residual_length,
        )
    except (ImportError, ValueError) as error:
        raise CacheError(f"no {backend} cache for this model: {' '.join(str(error).split())}") from error


def quantized(nbits: int, backend: str = "hqq", **settings: Any) -> Method:
    """Return the quantised cache as a method; `settings` are those of `quantized_cache`.

    Raises:
        CSKVError: the backend is unknown or has no such bits, its package is missing, or its kernel cannot be built.
    """
    _backend(backend, nbits)

    @contextmanager
    def on(model: PreTrainedModel) -> Iterator[NewCache]:
        yield functools.partial(quantized_cache, model, backend, nbits=nbits, **settings)

    facts = {"kind": "quantised", "backend": backend, "bits": nbits, **settings}
    return Method(f"QuantizedCache ({backend})", nbits / 16, on, facts, multiple=PACKED_TOKENS)


def _backend(name: str, nbits: int) -> Backend:
    """Return the backend of this name, known to be installed and to have a cache of these bits."""
    if name not in BACKENDS:
        raise CSKVError(f"backend is {name!r}; expected one of {', '.join(sorted(BACKENDS))}")
    backend = BACKENDS[name]
    try:
        found = importlib.util.find_spec(backend.module) is not None
    except ModuleNotFoundError:  # the package that holds the module is missing
        found = False
    if not found:
        raise CSKVError(f"the {name} cache needs {backend.package}: pip install 'cskv[peers]'")
    if nbits not in backend.bits:
        wanted = ", ".join(map(str, backend.bits))
        raise CSKVError(f"the {name} cache is asked for {nbits} bits; expected one of {wanted}")
    return backend


def _build_kernel(device: torch.device) -> None:
    """Make quanto compile what it unpacks with now, so that no measurement pays for it."""
    try:
        importlib.import_module(BACKENDS["quanto"].module)  # registers the operator
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8, device=device), 4)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise CSKVError(f"quanto compiles its kernel with ninja and g++, and could not ({reason}); use hqq") from error

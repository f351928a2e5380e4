"""The methods of the decode benchmark: ways to hold one layer's cache, whose steps append a token and attend."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.speed.problem import GROUP, KINDS, MIXED, PER_HEAD, SINKS_ON_A_GPU, WINDOW, Problem
from benchmarks.speed.registry import Unavailable
from benchmarks.speed.timing import Stopwatch
from cskv.attachment.cache_bytes import allocated_bytes
from cskv.attention.attend import AUTO, attention
from cskv.attention.cpu.library import library
from cskv.attention.inputs import rebuilt
from cskv.attention.int8_keys import Int8Keys
from cskv.cache.bibranch import BiBranchStore
from cskv.errors import CSKVError
from cskv.latents.view import PackedLatents, View
from cskv.methods.quantized import quantized_cache
from cskv.scratch import Scratch

SDPA, BEST, QUANTIZED = "transformers sdpa", "best uncompressed", "QuantizedCache 4 bits"
DENSE, POSITIONS = "dense rebuild", "cos and sin"
IN_INT8, FLASH = "joint, int8 keys", "sdpa, FlashDecoding"
ROOM = 128  # steps that the best uncompressed method can make
FLUSH = 2**26  # bytes: more than caches hold
Pair = tuple[Tensor, Tensor]


@dataclass
class Method:
    """One way to hold and read a layer's cache.

    Attributes:
        step: appends the token and attends: (batch, q_heads, 1, head_dim).
        nbytes: counts the bytes of the cache that are really allocated.
        read_nbytes: counts those that a step has to read.
        represented: the last sequence's keys and values as they are read; None where they are the problem's, rounded.
        call: makes what attends and does nothing else; None where that is not timed by itself.
        scratch: tensors that steps use again.
        note: what a reader of the results should know of this run.
        is_checked: whether steps return attention outputs.
    """

    step: Callable[[], Tensor]
    nbytes: Callable[[], int]
    read_nbytes: Callable[[], int]
    represented: Callable[[], Pair | None] = lambda: None
    call: Callable[[], Callable[[], Tensor]] | None = None
    scratch: Scratch | None = None
    note: str = ""
    is_checked: bool = True


def by_transformers(problem: Problem, keys: Tensor, values: Tensor) -> Tensor:
    """Attend by transformers' sdpa attention function."""
    scaling = problem.logits.scaling
    attended, _ = sdpa_attention_forward(problem.stub, problem.query, keys, values, None, scaling=scaling)
    return attended.transpose(1, 2)


def transformers_sdpa(problem: Problem, cache: Any = None) -> Method:
    """Attend by transformers to its cache, a `DynamicCache` when None: what a model does without us."""
    cache = DynamicCache() if cache is None else cache
    cache.update(*problem.cached[2:], 0)
    return Method(
        lambda: by_transformers(problem, *cache.update(*problem.new[2:], 0)),
        partial(allocated_bytes, cache),
        lambda: problem.exact_nbytes,
    )


def quantized(problem: Problem) -> Method:
    """Attend to transformers' `QuantizedCache` at 4 bits, which unpacks all keys and values at every step, by sdpa."""
    model, reasons = SimpleNamespace(config=problem.shape.config(), device=problem.device), []
    for backend in ("hqq", "quanto"):
        try:
            cache = quantized_cache(model, backend)
            break
        except CSKVError as error:
            reasons.append(str(error))
    else:
        raise Unavailable("; ".join(reasons))
    layer = cache.layers[0]
    if backend == "hqq":  # without its search for better zero points, which only a prefill pays for
        searching = layer.quantizer
        layer.quantizer = type("Quantizer", (searching,), {"quantize": partial(searching.quantize, optimize=False)})
    method = transformers_sdpa(problem, cache)

    def represented() -> Pair:
        held = (layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)
        keys, values = (torch.cat([layer._dequantize(old)[-1:], new[-1:]], dim=2).float() for old, new in held)
        return keys, values

    method.represented, method.read_nbytes, method.note = represented, method.nbytes, backend
    return method


class BestUncompressed:
    """Keys and values in buffers that are written in place, attended to by whatever was fastest when it was set up."""

    def __init__(self, problem: Problem, *, only_flash: bool = False) -> None:
        self._query, self._new = problem.query, problem.new[2:]
        self._length, self._scale = problem.tokens, problem.logits.scaling
        self._buffers = [pad(part, (0, 0, 0, ROOM)) for part in problem.cached[2:]]
        candidates = {
            "bmm over grouped heads": self._bmm,
            "bmm over the whole buffers": self._whole,
            "sdpa, query heads as queries": self._packed_sdpa,
        }
        if problem.device.type == "cpu":
            candidates["a product per kv head"] = self._loop
        else:
            candidates[f"sdpa, enable_gqa ({self._chosen()})"] = self._gqa
        if only_flash:
            candidates = {"enable_gqa": self._gqa, "query heads as queries": self._packed_sdpa}
            candidates = {name: partial(_by_flash, attend) for name, attend in candidates.items()}
        others = torch.zeros(FLUSH // 4, dtype=torch.float32, device=problem.device)
        seconds = {}
        for name, attend in candidates.items():
            try:
                seconds[name] = self._seconds(attend, Stopwatch(problem.device), others)
            except RuntimeError as error:  # there is no kernel for it
                reason = error
        if not seconds:
            raise Unavailable(f"torch has no kernel for it here: {reason}")
        self.note = min(seconds, key=lambda name: seconds[name])
        self._attend = candidates[self.note]

    def step(self) -> Tensor:
        """Append and attend."""
        for buffer, new in zip(self._buffers, self._new, strict=True):
            buffer[:, :, self._length : self._length + 1] = new
        self._length += 1
        return self.call()()

    def call(self, attend: Callable[..., Tensor] | None = None) -> Callable[[], Tensor]:
        """Return what attends and does nothing else."""
        filled = (buffer[:, :, : self._length] for buffer in self._buffers)
        return partial(attend or self._attend, self._query, *filled)

    def nbytes(self) -> int:
        """Count the bytes of both buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def _seconds(self, attend: Callable[..., Tensor], stopwatch: Stopwatch, others: Tensor) -> float:
        """Return the median of a few runs between which other memory was read, as between steps that take turns."""
        seconds = []
        for _ in range(8):
            others += 1
            seconds.append(stopwatch.seconds(self.call(attend)))
        return statistics.median(seconds[1:])

    def _grouped(self, query: Tensor) -> Tensor:
        """Return scaled queries as (batch * kv_heads, queries of a kv head, head_dim)."""
        return (query * self._scale).view(self._buffers[0].shape[:2].numel(), -1, query.shape[3])

    def _bmm(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.bmm(self._grouped(query), keys.flatten(0, 1).transpose(1, 2))
        return torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1)).view_as(query)

    def _whole(self, query: Tensor, keys: Tensor, _values: Tensor) -> Tensor:
        """As `_bmm`, on packed matrices: room that is not filled yet is computed too, and gets no weight."""
        all_keys, all_values = (buffer.flatten(0, 1) for buffer in self._buffers)
        scores = torch.bmm(self._grouped(query), all_keys.transpose(1, 2))
        scores[..., keys.shape[2] :] = -torch.inf
        return torch.bmm(torch.softmax(scores, dim=-1), all_values).view_as(query)

    def _loop(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `_bmm`, which on a CPU first copies matrices that are not packed together in memory."""
        scores = torch.stack([torch.mm(q, k.T) for q, k in zip(self._grouped(query), keys.flatten(0, 1), strict=True)])
        weights = torch.softmax(scores, dim=-1)
        parts = [torch.mm(w, v) for w, v in zip(weights, values.flatten(0, 1), strict=True)]
        return torch.stack(parts).view_as(query)

    def _packed_sdpa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
        return scaled_dot_product_attention(grouped, keys, values, scale=self._scale).reshape(query.shape)

    def _chosen(self) -> str:
        """Return the kernels that torch chooses for `_gqa`."""
        tensors = self._query, *self._buffers
        try:
            return SDPBackend(torch._fused_sdp_choice(*tensors, scale=self._scale, enable_gqa=True)).name
        except (AttributeError, TypeError, ValueError):  # it is no public function
            return "unknown kernels"

    def _gqa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, keys, values, scale=self._scale, enable_gqa=True)


def _by_flash(attend: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend(*tensors)


def flash_decoding(problem: Problem) -> Method:
    """Attend by torch's flash kernels, which split the tokens of a lone query, as `BestUncompressed` may choose to."""
    if problem.device.type != "cuda":
        raise Unavailable("it needs a GPU")
    best = BestUncompressed(problem, only_flash=True)
    return Method(best.step, best.nbytes, lambda: problem.exact_nbytes, call=best.call, note=best.note)


def best_uncompressed(problem: Problem) -> Method:
    """Attend by what is fastest here."""
    best = BestUncompressed(problem)
    return Method(best.step, best.nbytes, lambda: problem.exact_nbytes, call=best.call, note=best.note)


def by_torch(problem: Problem, bits: int = 16) -> Method:
    """Attend by the library's torch backend, which a machine without compiled kernels has."""
    if problem.device.type != "cpu" or library() is None:
        raise Unavailable("it is what the rows without a name of a backend are")
    return ours(problem, bits, "torch")


def ours(problem: Problem, bits: int = 16, backend: str = AUTO, in_int8: bool = False) -> Method:
    """Attend by the library to latents and the exact window in a `BiBranchStore`."""
    scratch, int8_keys = Scratch(), Int8Keys.of(problem.factors.k) if in_int8 else None

    def attend(view: View) -> Tensor:
        inputs = replace(problem.inputs(view), int8_keys=int8_keys)
        return attention(problem.query, inputs, backend=backend, scratch=scratch)

    method = _on_latents(problem, bits, attend)
    method.scratch = scratch
    return method


def dense_rebuild(problem: Problem) -> Method:
    """Rebuild, rotate and join all keys and values with the window at every step, as the official code does."""
    method = _on_latents(problem, 16, lambda view: by_transformers(problem, *rebuilt(problem.inputs(view))))
    method.call = None
    return method


def _on_latents(problem: Problem, bits: int, attend: Callable[[View], Tensor]) -> Method:
    sinks = SINKS_ON_A_GPU if problem.device.type == "cuda" else 0
    store = BiBranchStore(WINDOW, GROUP, *problem.grids(bits), sinks=sinks)
    view = store.append(*problem.cached)

    def append() -> View:
        nonlocal view
        view = store.append(*problem.new)
        return view

    def represented() -> Pair | None:
        if not isinstance(view.k, PackedLatents) or view.v is None:
            return None
        sealed = problem.rebuilt(view.k.read()[-1:], view.v.read()[-1:], view.sinks)
        exact = view.keys[-1:].float(), view.values[-1:].float()
        keys, values = (torch.cat(parts, dim=2) for parts in zip(sealed, exact, strict=True))
        return keys, values

    def read_nbytes() -> int:
        """Count latents and the window, without cos and sin."""
        latents = store.latent_nbytes()
        return latents.payload + latents.scales + latents.minima + view.keys.nbytes + view.values.nbytes

    return Method(lambda: attend(append()), store.nbytes, read_nbytes, represented, lambda: partial(attend, append()))


def cos_and_sin(problem: Problem) -> Method:
    """Make cos and sin of sealed tokens, which a forward pays for once for all its layers, outside the layer's step."""
    note = "once per forward, shared by all layers; commuting keys need none"
    return Method(lambda: problem.make_cos_sin(problem.tokens)[0], int, int, note=note, is_checked=False)


def methods(backend: str = AUTO) -> dict[str, tuple[str, Callable[[Problem], Method]]]:
    """Name -> the kind of problem that it solves, and how it is set up."""
    plain = {SDPA: transformers_sdpa, BEST: best_uncompressed, QUANTIZED: quantized, DENSE: dense_rebuild}
    result = {name: ("joint", make) for name, make in plain.items()}
    for name, kind, bits in _latents():
        result[name] = (kind, partial(ours, bits=bits, backend=backend))
    if backend == AUTO:
        result |= {f"{name}, by torch": (kind, partial(by_torch, bits=bits)) for name, kind, bits in _latents()}
    return result | {POSITIONS: ("joint", cos_and_sin)}


def _latents() -> list[tuple[str, str, int]]:
    """List the name, kind and bits of every method on latents."""
    return [(f"{kind}, 4 bits" if bits == 4 else kind, kind, bits) for kind in KINDS for bits in (16, 4)]


def on_a_gpu(backend: str = AUTO) -> dict[str, tuple[str, Callable[[Problem], Method]]]:
    """Return the methods that are measured on a GPU alone, likewise."""
    result: dict[str, tuple[str, Callable[[Problem], Method]]] = {
        FLASH: ("joint", flash_decoding),
        IN_INT8: ("joint", partial(ours, backend=backend, in_int8=True)),
        PER_HEAD: (PER_HEAD, partial(ours, backend=backend)),
        f"{PER_HEAD}, 4 bits": (PER_HEAD, partial(ours, bits=4, backend=backend)),
    }
    for kind in ("joint", "commuting"):
        for bits, name in ((8, "8 bits"), (MIXED, "mixed widths")):
            result[f"{kind}, {name}"] = (kind, partial(ours, bits=bits, backend=backend))
    return result

"""The methods of the decode benchmark. One object holds one layer's cache; `step` appends a token and attends."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from decode_problem import GROUP, KINDS, WINDOW, Problem
from decode_timing import Stopwatch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cskv.attachment.cache_bytes import allocated_bytes
from cskv.attention.attend import AUTO, attention
from cskv.attention.inputs import rebuilt
from cskv.cache.bibranch import BiBranchStore
from cskv.errors import CSKVError
from cskv.latents.view import PackedLatents, View
from cskv.methods.quantized import quantized_cache
from cskv.scratch import Scratch

SDPA, BEST, QUANTIZED = "transformers sdpa", "best uncompressed", "QuantizedCache 4 bits"
DENSE, POSITIONS = "dense rebuild", "cos and sin"
FLUSH = 2**26  # bytes: more than caches hold
Pair = tuple[Tensor, Tensor]


class Skipped(Exception):
    """This method cannot be measured here, and why."""


def by_transformers(problem: Problem, keys: Tensor, values: Tensor) -> Tensor:
    """Attend by transformers' sdpa attention function."""
    scaling = problem.logits.scaling
    attended, _ = sdpa_attention_forward(problem.stub, problem.token.query, keys, values, None, scaling=scaling)
    return attended.transpose(1, 2)


class Method:
    """One way to hold and read a layer's cache.

    Attributes:
        note: what a reader of the results should know of this run.
        is_checked: whether steps return attention outputs.
    """

    note = ""
    is_checked = True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def step(self) -> Tensor:
        """Append the token and attend: (batch, q_heads, 1, head_dim)."""
        raise NotImplementedError

    def represented(self) -> Pair | None:
        """Return the last sequence's keys and values as they are read; None where they are the problem's, rounded."""
        return None

    def nbytes(self) -> int:
        """Count the bytes of the cache that are really allocated."""
        return 0

    def read_nbytes(self) -> int:
        """Count the bytes of the cache that a step has to read."""
        token = self.problem.token
        return (token.keys.nbytes + token.values.nbytes) * (self.problem.tokens + 1)


class TransformersSdpa(Method):
    """`DynamicCache` and transformers' sdpa attention function: what a model does without us."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._cache = DynamicCache()
        self._cache.update(problem.keys, problem.values, 0)

    def step(self) -> Tensor:
        token = self.problem.token
        return by_transformers(self.problem, *self._cache.update(token.keys, token.values, 0))

    def nbytes(self) -> int:
        return allocated_bytes(self._cache)


class BestUncompressed(Method):
    """Keys and values in buffers that are written in place, attended to by whatever was fastest when it was set up."""

    ROOM = 128  # steps that can be made

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        batch, heads, tokens, head_dim = problem.keys.shape
        shape = (batch, heads, tokens + self.ROOM, head_dim)
        self._keys, self._values = (torch.zeros(shape, dtype=problem.dtype, device=problem.device) for _ in range(2))
        self._keys[:, :, :tokens], self._values[:, :, :tokens] = problem.keys, problem.values
        self._length = tokens
        candidates = {
            "bmm over grouped heads": self._bmm,
            "bmm over the whole buffers": self._whole,
            "sdpa, query heads as queries": self._packed_sdpa,
        }
        if problem.device.type == "cpu":
            candidates["a product per kv head"] = self._loop
        else:
            candidates["sdpa, enable_gqa"] = self._gqa
        self.note = min(candidates, key=lambda name: self._seconds(candidates[name]))
        self._attend = candidates[self.note]

    def step(self) -> Tensor:
        token, at = self.problem.token, self._length
        self._keys[:, :, at : at + 1], self._values[:, :, at : at + 1] = token.keys, token.values
        self._length += 1
        return self.attend_again()

    def attend_again(self) -> Tensor:
        """Attend, and do nothing else."""
        keys, values = (part[:, :, : self._length] for part in (self._keys, self._values))
        return self._attend(self.problem.token.query, keys, values)

    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def _grouped(self, query: Tensor) -> Tensor:
        """Return scaled queries as (batch * kv_heads, queries of a kv head, head_dim)."""
        groups = self._keys.shape[1]
        return (query * self.problem.logits.scaling).view(-1, query.shape[1] // groups, query.shape[3])

    def _bmm(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.bmm(self._grouped(query), keys.flatten(0, 1).transpose(1, 2))
        return torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1)).view_as(query)

    def _whole(self, query: Tensor, keys: Tensor, _values: Tensor) -> Tensor:
        """As `_bmm`, on packed matrices: room that is not filled yet is computed too, and gets no weight."""
        scores = torch.bmm(self._grouped(query), self._keys.flatten(0, 1).transpose(1, 2))
        scores[..., keys.shape[2] :] = -torch.inf
        return torch.bmm(torch.softmax(scores, dim=-1), self._values.flatten(0, 1)).view_as(query)

    def _loop(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `_bmm`, which on a CPU first copies matrices that are not packed together in memory."""
        scores = torch.stack([torch.mm(q, k.T) for q, k in zip(self._grouped(query), keys.flatten(0, 1), strict=True)])
        weights = torch.softmax(scores, dim=-1)
        parts = [torch.mm(w, v) for w, v in zip(weights, values.flatten(0, 1), strict=True)]
        return torch.stack(parts).view_as(query)

    def _packed_sdpa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
        scale = self.problem.logits.scaling
        return scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(query.shape)

    def _gqa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scale = self.problem.logits.scaling
        return scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)

    def _seconds(self, attend: Callable[..., Tensor]) -> float:
        """Return the median of a few runs between which other memory was read, as between steps that take turns."""
        seconds, stopwatch = [], Stopwatch(self.problem.device)
        others = torch.zeros(FLUSH // 4, dtype=torch.float32, device=self.problem.device)
        keys, values = (part[:, :, : self._length] for part in (self._keys, self._values))
        for _ in range(8):
            others += 1
            seconds.append(stopwatch.seconds(partial(attend, self.problem.token.query, keys, values)))
        return statistics.median(seconds[1:])


class Quantized(TransformersSdpa):
    """transformers' `QuantizedCache` at 4 bits, which unpacks all keys and values at every step, and sdpa."""

    def __init__(self, problem: Problem) -> None:
        Method.__init__(self, problem)
        model, reasons = SimpleNamespace(config=problem.shape.config(), device=problem.device), []
        for backend in ("hqq", "quanto"):
            try:
                self._cache = quantized_cache(model, backend)
                break
            except CSKVError as error:
                reasons.append(str(error))
        else:
            raise Skipped("; ".join(reasons))
        if backend == "hqq":
            self._cache.layers[0].quantizer = _without_search(self._cache.layers[0].quantizer)
        self._cache.update(problem.keys, problem.values, 0)
        self.note = backend

    def represented(self) -> Pair:
        layer, parts = self._cache.layers[0], []
        for packed, rest in ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)):
            parts.append(torch.cat([layer._dequantize(packed)[-1:], rest[-1:]], dim=2).float())
        return parts[0], parts[1]

    def read_nbytes(self) -> int:
        return self.nbytes()


def _without_search(quantizer: Any) -> Any:
    """The quantiser of hqq without its search for better zero points, which only a prefill pays for."""
    return type("Quantizer", (quantizer,), {"quantize": partial(quantizer.quantize, optimize=False)})


class Ours(Method):
    """Latents and the exact window in a `BiBranchStore`, attended to by the library."""

    def __init__(self, problem: Problem, bits: int = 16, backend: str = AUTO) -> None:
        super().__init__(problem)
        self._store = BiBranchStore(WINDOW, GROUP, *problem.grids(bits))
        self._store.append(problem.k_latents, problem.v_latents, problem.keys, problem.values)
        self._backend, self.scratch, self.view = backend, Scratch(), None

    def step(self) -> Tensor:
        return self.attend(self.append())

    def append(self) -> View:
        """Append the token to the cache."""
        token = self.problem.token
        self.view = self._store.append(token.k_latents, token.v_latents, token.keys, token.values)
        return self.view

    def attend(self, view: View) -> Tensor:
        """Attend, and do nothing else."""
        query = self.problem.token.query
        return attention(query, self.problem.inputs(view), backend=self._backend, scratch=self.scratch)

    def represented(self) -> Pair | None:
        view = self.view
        if view is None or not isinstance(view.k, PackedLatents) or view.v is None:
            return None
        sealed = self.problem.rebuilt(view.k.read()[-1:], view.v.read()[-1:])
        return tuple(  # type: ignore[return-value]
            torch.cat([old, exact[-1:].float()], dim=2)
            for old, exact in zip(sealed, (view.keys, view.values), strict=True)
        )

    def nbytes(self) -> int:
        return self._store.nbytes()

    def read_nbytes(self) -> int:
        """Latents and the window, without cos and sin."""
        latents, view = self._store.latent_nbytes(), self.view
        window = 0 if view is None else view.keys.nbytes + view.values.nbytes
        return latents.payload + latents.scales + latents.minima + window


class DenseRebuild(Ours):
    """All keys and values are rebuilt, rotated and joined with the window at every step, as the official code does."""

    def attend(self, view: View) -> Tensor:
        return by_transformers(self.problem, *rebuilt(self.problem.inputs(view)))


class CosAndSin(Method):
    """Cos and sin of sealed tokens, which a forward pays for once for all its layers, outside the layer's own step."""

    is_checked = False
    note = "once per forward, shared by all layers; commuting keys need none"

    def step(self) -> Tensor:
        return self.problem.positions.make(self.problem.tokens)[0]

    def read_nbytes(self) -> int:
        return 0


def methods(backend: str = AUTO) -> dict[str, tuple[str, Callable[[Problem], Method]]]:
    """Name -> the kind of problem that it solves, and how it is set up."""
    result: dict[str, tuple[str, Callable[[Problem], Method]]] = {
        SDPA: ("joint", TransformersSdpa),
        BEST: ("joint", BestUncompressed),
        QUANTIZED: ("joint", Quantized),
        DENSE: ("joint", DenseRebuild),
    }
    for kind in KINDS:
        result[kind] = (kind, partial(Ours, backend=backend))
        result[f"{kind}, 4 bits"] = (kind, partial(Ours, bits=4, backend=backend))
    return result | {POSITIONS: ("joint", CosAndSin)}

"""A server in small: requests share the memory of one layer, and each has a store of its own to be compared with."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from cskv.attention import reference
from cskv.attention.inputs import AttentionInputs, KeyOffset, Logits
from cskv.cache.bibranch import BiBranchStore
from cskv.cache.ring import Ring
from cskv.latents.pages import PagedLatents, PageLayout
from cskv.latents.view import View
from cskv.quantization.grid import Grid
from cskv.scratch import Scratch
from cskv.vllm.compute import LayerCache, LayerRules, attend, write
from cskv.vllm.step import Step, plan_step
from tests.attention.problems import Problem

MOST = 260  # tokens that a request may get
PLACES = 4  # requests at a time


@dataclass(frozen=True)
class Setting:
    """One layer, and how its cache is kept.

    Attributes:
        problem: sizes, factors and rope.
        window, group: see `CSKVConfig`.
        k_grid, v_grid: of packed latents.
        block_size: tokens of a page.
        softcap: of logits.
        dtype: of all tensors.
        sinks: see `CSKVConfig`.
        offset: whether latents leave a constant out of the keys, which is rotated on half of their channels.
    """

    problem: Problem
    window: int
    group: int
    k_grid: Grid | None = None
    v_grid: Grid | None = None
    block_size: int = 16
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    sinks: int = 0
    offset: bool = False

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.problem.k_rank, self.problem.v_rank, self.dtype, self.k_grid, self.v_grid)

    @property
    def ring(self) -> Ring | None:
        if self.window + self.group + self.sinks == 1:
            return None
        waiting = (0 if grid is None or grid.block_tokens == 1 else grid.rank for grid in (self.k_grid, self.v_grid))
        sizes = self.problem.kv_heads, self.problem.head_dim
        return Ring(self.window, self.group, *sizes, *waiting, self.dtype, self.sinks)

    @property
    def rules(self) -> LayerRules:
        factors = self.problem.factors().to(dtype=self.dtype)
        logits = Logits(0.3, self.softcap)  # not what a product of queries and keys is usually scaled by
        return LayerRules(factors, self.problem.rope(self.dtype), logits, Scratch(), self.key_offset)

    @property
    def key_offset(self) -> KeyOffset | None:
        if not self.offset:
            return None
        problem = replace(self.problem, rotary=self.problem.head_dim // 2)
        rotation = problem.rope(self.dtype)
        assert rotation is not None
        return KeyOffset(rotation, torch.linspace(-3, 3, problem.kv_heads * problem.head_dim))


@dataclass
class Request:
    """A request that lives.

    Attributes:
        store: what it would be by itself behind the sinks.
        sinks: its first keys and values, (1, kv_heads, tokens, head_dim).
        ring_page: of its ring; 0 where there are none.
        pages: of its latents, in order.
        length: its tokens.
    """

    store: BiBranchStore
    sinks: tuple[Tensor, Tensor]
    ring_page: int
    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Tokens:
    """What a step's tokens are, (tokens, ...)."""

    query: Tensor
    keys: Tensor
    values: Tensor
    latents: tuple[Tensor, Tensor]

    def of(self, rows: slice) -> tuple[Tensor, ...]:
        """Query, keys and values, (1, heads, tokens, head_dim), and latents, (1, tokens, rank), of some."""
        heads = (part[rows].transpose(0, 1)[None] for part in (self.query, self.keys, self.values))
        return *heads, *(part[rows][None] for part in self.latents)


class Server:
    """Blocks of memory in no order, each of them the latents of some tokens or a ring. Nothing is ever cleared: they
    are NaN at first, and hold what other requests left in them later.
    """

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self.setting, self.layout, self.ring = setting, setting.layout, setting.ring
        self.rules = setting.rules
        page_bytes = self.layout.page_bytes(setting.block_size)
        ring_bytes = 0 if self.ring is None else self.ring.page_bytes
        blocks = 1 + PLACES * (-(-MOST // setting.block_size) + 1)
        # As a block lies in vLLM's pool: this layer's part of it is between those of other layers.
        self.memory = torch.full((blocks, 16 + max(page_bytes, ring_bytes) + 48), 255, dtype=torch.uint8)
        self.k, self.v = self.layout.pages(self.memory[:, 16 : 16 + page_bytes], setting.block_size)
        self.rings = None if self.ring is None else self.ring.rings(self.memory[:, 16 : 16 + ring_bytes])
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._free = list(range(1, blocks))
        self._random.shuffle(self._free)

    def begin(self, prefix: Request | None = None) -> Request:
        """A new request; one with a prefix begins with another's pages and what they hold."""
        setting = self.setting
        store = BiBranchStore(setting.window, setting.group, setting.k_grid, setting.v_grid)
        none = torch.empty(1, setting.problem.kv_heads, 0, setting.problem.head_dim, dtype=setting.dtype)
        request = Request(store, (none, none), 0 if self.ring is None else self._free.pop())
        if prefix is not None:
            request.pages, request.length = prefix.pages[:], prefix.length
        return request

    def end(self, request: Request) -> None:
        """Give a request's blocks back."""
        self._free += [*request.pages, request.ring_page][: len(request.pages) + (self.ring is not None)]
        self._random.shuffle(self._free)

    def step(self, batch: list[tuple[Request, int]], padding: int = 0) -> tuple[Tensor, Tensor]:
        """Some requests get some tokens each.

        Args:
            batch: requests, and how many; those that get one come first.
            padding: requests and tokens that are not there, as vLLM adds them.

        Returns:
            what was computed for the tokens, and what each request by itself gives, in fp64.
        """
        sizes = [size for _, size in batch]
        for request, size in batch:
            request.length += size
            while len(request.pages) * self.setting.block_size < request.length:
                request.pages.append(self._free.pop())
        plan = self._plan([request for request, _ in batch], sizes, padding)
        tokens = self._draw(plan.tokens + padding)
        cache = self._cache([request for request, _ in batch], padding)
        output = torch.full_like(tokens.query, float("nan"))
        expected = torch.cat([self._alone(plan, i, request, tokens) for i, (request, _) in enumerate(batch)])
        attend(plan, cache, self.rules, *(part[: plan.tokens] for part in (tokens.query, tokens.keys, tokens.values)),
               output)  # fmt: skip
        own = tuple(part[: plan.tokens] for part in tokens.latents)
        write(plan, cache, tokens.keys[: plan.tokens], tokens.values[: plan.tokens], own)
        assert output[plan.tokens :].isnan().all()
        return output[: plan.tokens], expected

    def around(self) -> Tensor:
        """What lies between the pages of this layer."""
        return torch.cat([self.memory[:, :16], self.memory[:, -48:]], dim=1)

    def _plan(self, requests: list[Request], sizes: list[int], padding: int) -> Step:
        """What vLLM says of a batch, worked out."""
        rows, columns = len(requests) + padding, -(-MOST // self.setting.block_size)
        # Past a request's own pages, a block table names what other requests had in that row.
        table = torch.randint(len(self.memory), (rows, columns), generator=self._generator, dtype=torch.int32)
        slots = []
        for row, (request, size) in enumerate(zip(requests, sizes, strict=True)):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
            for position in range(request.length - size, request.length):
                page, place = divmod(position, self.setting.block_size)
                slots.append(request.pages[page] * self.setting.block_size + place)
        starts = list(accumulate(sizes, initial=0))
        starts += starts[-1:] * padding
        lengths = [request.length for request in requests] + [self._random.randrange(MOST) for _ in range(padding)]
        slots += [-1] * padding
        numbers = np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)
        setting = self.setting
        sizes = {"window": setting.window, "group": setting.group, "sinks": setting.sinks}
        return plan_step(*numbers, table, torch.tensor(slots), setting.block_size, **sizes)

    def _cache(self, requests: list[Request], padding: int) -> LayerCache:
        if self.ring is None:
            return LayerCache(self.k, self.v)
        pages = torch.tensor([request.ring_page for request in requests] + [0] * padding)
        return LayerCache(self.k, self.v, self.ring, self.rings, pages)

    def _draw(self, count: int) -> Tokens:
        problem = self.setting.problem
        shapes = (
            *((count, heads, problem.head_dim) for heads in (problem.q_heads, problem.kv_heads, problem.kv_heads)),
            (count, problem.k_rank),
            (count, problem.v_rank),
        )
        parts = [torch.randn(shape, generator=self._generator).to(self.setting.dtype) for shape in shapes]
        return Tokens(*parts[:3], (parts[3], parts[4]))

    def _alone(self, plan: Step, index: int, request: Request, tokens: Tokens) -> Tensor:
        """A request's output by itself, (tokens, q_heads, head_dim); what is sealed must be the same to the bit."""
        start = int(plan.start[index])
        rows = slice(start, start + request.length - int(plan.length[index]))
        query, keys, values, k, v = tokens.of(rows)
        view = self._grown(request, keys, values, k, v)
        assert view.sealed == int(plan.sealed[index])
        if view.k is not None and view.v is not None:
            table, lengths = plan.table[index : index + 1], plan.sealed[index : index + 1]
            for pages, alone in ((self.k, view.k), (self.v, view.v)):
                paged = PagedLatents(pages, table, lengths, view.sealed)
                assert torch.equal(paged.read(), alone.read())
        return self._reference(query, view)[0].transpose(0, 1)

    def _grown(self, request: Request, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> View:
        """What a request's new tokens read: its first ones and what a store of all others gives."""
        held = request.sinks[0].shape[2]
        sinks = min(self.setting.sinks - held, keys.shape[2])
        new = keys[:, :, :sinks], values[:, :, :sinks]
        request.sinks = tuple(torch.cat(parts, dim=2) for parts in zip(request.sinks, new))
        if sinks == keys.shape[2]:
            return View(*request.sinks)
        view = request.store.append(k[:, sinks:], v[:, sinks:], keys[:, :, sinks:], values[:, :, sinks:])
        exact = (torch.cat(parts, dim=2) for parts in zip(request.sinks, (view.keys, view.values)))
        return View(*exact, view.k, view.v)

    def _reference(self, query: Tensor, view: View) -> Tensor:
        rules, position = self.rules, self.setting.sinks + torch.arange(view.sealed)
        rope, offset = rules.rope, rules.offset
        if rope is not None:
            rope = replace(rope, cos=rope.cos[:, position], sin=rope.sin[:, position])
        if offset is not None:
            cos, sin = offset.rotation.cos[:, position], offset.rotation.sin[:, position]
            offset = replace(offset, rotation=replace(offset.rotation, cos=cos, sin=sin))
        inputs = AttentionInputs(view, rules.factors, rope, rules.logits, key_offset=offset)
        return reference.attention(query.double(), inputs)


def off_by(output: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest number; infinite where NaN came out."""
    error = float((output.double() - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(error) else error

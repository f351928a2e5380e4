"""Decoding end to end: tokens per second of random Llamas of 8B's and 1B's shape on long contexts, by CUDA graphs.

Every method decodes by `cskv.DecodeGraph` on a `StaticCache`, and by ordinary forwards on a dynamic one ("eager"). The
uncompressed cache does both as well, and is written in place and attended to by FlashDecoding, its forward captured in
a CUDA graph: ratios are over whichever of these is fastest. All share one set of weights and come one after the other.
Caches are filled without a real prefill, which changes no speed (`benchmarks.speed.llamas`), and factors are random, of
the shapes of real ones. Logits after a short prompt are first compared with those of `attention="reference"`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

import cskv
from benchmarks.common import Jobs, Row, Wrong
from benchmarks.pages import Table
from benchmarks.speed.generation import TOLERANCE
from benchmarks.speed.llamas import DENSITY, SIZES, TINY, adapter, filled, in_place
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.timing import captured, summary
from cskv.attachment.cache_bytes import cache_report
from cskv.evaluation.forward import clock, forward

UNCOMPRESSED, IN_PLACE, EAGER = "uncompressed, StaticCache", "uncompressed, in place", "eager"
DYNAMIC = f"uncompressed, {EAGER}"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "commuting": {"key_factors": "commuting"},
    "commuting, 4 bits": {"key_factors": "commuting", "k_bits": 4, "v_bits": 4},
    "grouped by head": {"head_groups": "each"},
    "joint": {},
    "joint, int8 keys": {"int8_keys": True},
}
WARM = 34  # a group is packed in so many steps
WARM_EAGER = 3
MOST = 2**17  # tokens of all sequences: more do not fit uncompressed beside the model
GOAL = 1.5  # times the tokens per second of the fastest uncompressed cache, at 64K tokens
On = Callable[[], AbstractContextManager[Any]]


def attached(name: str, model: LlamaForCausalLM, backend: str) -> tuple[On, Row]:
    """Return what attaches a method to the model, and the error of its logits; raise `Wrong` if they are off."""
    settings = METHODS[name]
    own, how = adapter(model, settings), {"int8_keys": settings.get("int8_keys", False)}
    on, by_reference = (partial(cskv.attach, model, own, attention=by, **how) for by in (backend, "reference"))
    return on, {"error": _error(name, model, on, by_reference)}


def _error(name: str, model: LlamaForCausalLM, on: On, by_reference: On) -> float:
    logits = []
    for attaching in (on, by_reference):
        with attaching():
            ids = torch.randint(3, 100, (1, 200), generator=torch.Generator().manual_seed(1))
            _, held = forward(model, ids[:, :-1])
            logits.append(forward(model, ids[:, -1:], held)[0].float())
    error = float((logits[0] - logits[1]).norm() / logits[1].norm())
    if not error <= TOLERANCE:
        raise Wrong(f"{name}: logits are {error:.3g} off the reference's, at most {TOLERANCE:g}")
    return error


class Decoder:
    """Steps of one method on a cache of its own, which is filled.

    Attributes:
        cache: transformers'.
        step: appends a token to every sequence.
    """

    def __init__(self, name: str, prompt: Tensor, room: int, model: LlamaForCausalLM) -> None:
        capacity, self._model = prompt.shape[1] + room, model
        by_forwards = name.endswith(EAGER) or name == IN_PLACE
        if name == IN_PLACE:
            self.cache = in_place(model.config.num_hidden_layers, capacity)
        elif by_forwards:
            self.cache = DynamicCache()
        else:
            self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._token = filled(model, self.cache, prompt)
        self.step: Callable[[], object] = self._forward
        if name == IN_PLACE and prompt.is_cuda:
            self.step = captured(self._forward)  # at one length again and again
        elif not by_forwards:
            graph = cskv.DecodeGraph(model, self.cache)
            graph.step(self._token)
            self.step = graph.step

    def _forward(self) -> None:
        logits, _ = forward(self._model, self._token, self.cache, last_only=True)
        self._token.copy_(logits.argmax(-1))


def measure(name: str, tokens: int, batch: int, model: LlamaForCausalLM, asked: Any) -> Row:
    """Fill a cache and decode on it. What is attached stays off the model otherwise."""
    warm = min(asked.warm, WARM_EAGER) if name.endswith(EAGER) else asked.warm
    prompt = torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    began = clock(model.device)
    decoder = Decoder(name, prompt, warm + asked.steps * asked.rounds + 8, model)
    row: Row = {"fill_seconds": clock(model.device) - began}
    for _ in range(warm):
        decoder.step()
    row["nbytes"], speeds = cache_report(decoder.cache, model).total_bytes, []
    for _ in range(asked.rounds):
        began = clock(model.device)
        for _ in range(asked.steps):
            decoder.step()
        speeds.append(batch * asked.steps / (clock(model.device) - began))
    return row | {"tokens_per_second": summary(speeds)}


def tables(results: dict[str, Any]) -> list[Table]:
    """Show speed and bytes over the uncompressed cache's, and tokens per second."""
    rows, lines = results["rows"].values(), []
    for cell in dict.fromkeys((row["size"], row["batch"], row["tokens"]) for row in rows):
        own = {row["method"]: row for row in rows if (row["size"], row["batch"], row["tokens"]) == cell}
        base = fastest(own)
        for name, row in own.items():
            speed, ratio, share = _speed(row), "", ""
            if base is not None:
                ratio, share = f"{speed / _speed(base):.2f}x", f"{row['nbytes'] / base['nbytes']:.0%}"
            lines.append((cell[0], f"{cell[1]} x {cell[2]}", name, f"{speed:.1f}", ratio, share))
    headings = ("model", "tokens", "cache", "tokens/s", "over the fastest uncompressed", "bytes")
    return [Table("Decoding end to end", headings, lines)]


def at_a_glance(results: dict[str, Any]) -> Table:
    """Show tokens per second, and how many times that of the fastest uncompressed cache it is."""
    rows = results["rows"].values()
    cells = dict.fromkeys((row["size"], row["batch"], row["tokens"]) for row in rows)
    by_cell = {
        cell: {row["method"]: row for row in rows if (row["size"], row["batch"], row["tokens"]) == cell}
        for cell in cells
    }

    def show(own: Mapping[str, Row], name: str) -> str:
        if name not in own:
            return ""
        base = fastest(own)
        return f"{_speed(own[name]):.1f}" + ("" if base is None else f" {_speed(own[name]) / _speed(base):.2f}x")

    names = dict.fromkeys(row["method"] for row in rows)
    lines = [(name, *(show(own, name) for own in by_cell.values())) for name in names]
    headings = ("cache", *(f"{size}, {batch} x {tokens}" for size, batch, tokens in cells))
    return Table("Tokens per second, end to end, x the fastest uncompressed", headings, lines)


def goals(results: dict[str, Any]) -> Table:
    """Compare the 8B shape at 64K tokens with its goal."""
    cell = ("8B", 1, 65_536)
    own = {r["method"]: r for r in results["rows"].values() if (r["size"], r["batch"], r["tokens"]) == cell}
    base, lines = fastest(own), []
    for name in METHODS:
        found = f"{_speed(own[name]) / _speed(base):.2f}x" if name in own and base is not None else "not measured"
        met = "" if name not in own or base is None else "yes" if _speed(own[name]) >= GOAL * _speed(base) else "**no**"
        lines.append((f"{name}: >= {GOAL}x tokens/s of the fastest uncompressed", found, met))
    return Table("Goals end to end, 8B at 64K tokens, batch 1", ("goal", "measured", "met"), lines)


def fastest(own: Mapping[str, Row]) -> Row | None:
    """Return the fastest of the uncompressed caches; None where there is none."""
    return max((row for name, row in own.items() if name.startswith("uncompressed")), key=_speed, default=None)


def _speed(row: Row) -> float:
    return float(row["tokens_per_second"]["median"])


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, and a job per model, batch, length and method; a model is made by the first of its jobs."""
    if asked.device == "cpu" and not asked.quick:
        raise Unavailable("no GPU; --quick decodes with a tiny model")
    sizes = TINY if asked.quick else {name: SIZES[name] for name in asked.sizes}
    models = {name: cache(partial(size.model, asked.device)) for name, size in sizes.items()}
    ready = cache(lambda size, name: attached(name, models[size](), asked.backend))

    def job(size: str, batch: int, tokens: int, name: str) -> Row:
        kept: Row = {"size": size, "batch": batch, "tokens": tokens, "method": name}
        try:
            with torch.no_grad():
                model, on = models[size](), nullcontext
                if not name.startswith("uncompressed"):
                    on, error = ready(size, name.removesuffix(f", {EAGER}"))
                    kept |= error
                with on():
                    return kept | measure(name, tokens, batch, model, asked)
        finally:
            gc.collect()
            if asked.device == "cuda":
                torch.cuda.empty_cache()

    by_graph, eager = [UNCOMPRESSED, IN_PLACE, *asked.methods], [f"{name}, {EAGER}" for name in asked.methods]
    cells = [(batch, tokens) for batch, tokens in asked.cells if batch * tokens <= MOST]
    cells = sorted(cells, key=lambda cell: (cell[0], -cell[1]))
    order = [(size, *cell, by_graph) for size in sizes for cell in cells]
    # What a user of `generate` gets, at the longest context right behind what graphs do there.
    forwards = [(size, *cell, [DYNAMIC, *eager]) for size in sizes for cell in cells]
    order = [order[0], forwards[0], *order[1:], *forwards[1:]]
    jobs = {
        f"{size}, {batch} x {tokens}, {name}": partial(job, size, batch, tokens, name)
        for size, batch, tokens, names in order
        for name in names
    }
    shapes = {name: asdict(shape) for name, shape in sizes.items()}
    return {"sizes": shapes, "device": asked.device, "backend": asked.backend, "density": DENSITY}, jobs


BENCHMARK = Benchmark(
    plan,
    tables,
    "a tiny model, a prompt of 128 tokens",
    whole=((65_536, 16_384), (1,)),
    small=((128,), (1,)),
    methods=tuple(METHODS),
    options={
        "--sizes": {"nargs": "+", "choices": tuple(SIZES), "default": tuple(SIZES), "help": "of the Llama"},
        "--steps": {"type": int, "default": 64, "help": "of a stretch of decoding"},
        "--warm": {"type": int, "default": WARM, "help": "steps of a graph before those that are timed"},
        "--rounds": {"type": int, "default": 5, "help": "stretches"},
    },
)

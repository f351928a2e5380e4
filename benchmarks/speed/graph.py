"""Decoding end to end by CUDA graphs: tokens per second of random Llamas of 8B's and 1B's shape after long prompts.

Every method decodes by `cskv.DecodeGraph` on a `StaticCache` that a real prefill has filled, the uncompressed one too.
All share one set of weights and come one after the other; the uncompressed cache is measured first and last. Factors
are random, of the shapes of real ones. Logits after a short prompt are first compared with those of
`attention="reference"`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, StaticCache

import cskv
from benchmarks.common import Jobs, Row, Wrong
from benchmarks.pages import Table
from benchmarks.speed.generation import TOLERANCE, commuting_factors
from benchmarks.speed.problem import llama
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.timing import summary
from cskv.attachment.cache_bytes import cache_report
from cskv.evaluation.forward import clock, forward
from cskv.models.compat import cache_kwarg
from cskv.models.survey import survey

UNCOMPRESSED, AGAIN = "uncompressed, sdpa", "uncompressed, again"
DENSITY = 192 / 1024  # whole blocks of 8 latents, in 8 groups too
METHODS: Mapping[str, Mapping[str, Any]] = {
    "commuting": {"key_factors": "commuting"},
    "grouped by head": {"head_groups": "each"},
    "joint": {},
    "joint, int8 keys": {"int8_keys": True},
    "commuting, 4 bits": {"key_factors": "commuting", "k_bits": 4, "v_bits": 4},
}
PIECE = 16_384  # tokens of a prompt that are read at a time
WARM = 34  # a group is packed in so many steps


@dataclass(frozen=True)
class Size:
    """The shape of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int = 32_000

    def model(self, device: str) -> LlamaForCausalLM:
        """Make the model with random weights in bf16, where it is to run."""
        torch.manual_seed(0)
        others = {"intermediate_size": self.mlp, "vocab_size": self.vocabulary}
        config = llama(self.heads, self.kv_heads, self.head_dim, num_hidden_layers=self.layers, **others)
        config.hidden_size, config._attn_implementation = self.hidden, "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


SIZES = {"8B": Size(4096, 32, 32, 8, 128, 14_336), "1B": Size(2048, 16, 32, 8, 64, 8192)}
TINY = {"tiny": Size(64, 2, 8, 8, 16, 64, 128)}


def adapter(model: nn.Module, settings: Mapping[str, Any]) -> cskv.CSKVAdapter:
    """Make random factors of the ranks that the settings ask for, the same in all layers but for what they read."""
    found, layers = survey(model), {}
    first = found.sites[0]
    settings = {key: value for key, value in settings.items() if key != "int8_keys"}
    groups = first.kv_dim // first.head_dim if settings.get("head_groups") == "each" else 1
    density = max(round(DENSITY * first.kv_dim / groups) // 2 * 2, 2) * groups / first.kv_dim
    config = cskv.CSKVConfig(k_density=density, v_density=density, init="pca", **{**settings, "head_groups": groups})
    rank, rows = config.k_rank(first.kv_dim) // groups, first.kv_dim // groups
    draw = torch.Generator().manual_seed(2)
    bases = [torch.linalg.qr(torch.randn(rows, rank, generator=draw)).Q for _ in range(groups)]
    commuting = config.key_factors == "commuting"
    keys = commuting_factors(first.kv_dim, first.head_dim, rank, draw) if commuting else None
    for site in found.sites:
        pair = [_random(projection, bases) for projection in (site.k, site.v)]
        layers[site.layer_idx] = cskv.LayerFactors(pair[0] if keys is None else keys, pair[1])
    return cskv.CSKVAdapter(config, layers, found.base)


def _random(projection: Any, bases: list[Tensor]) -> cskv.Factors:
    weight = projection.weight.detach().float()
    parts = zip(bases, weight.chunk(len(bases)), strict=True)
    return cskv.Factors.grouped([cskv.Factors((basis.to(part.device).T @ part).cpu(), basis) for basis, part in parts])


def measure_one(name: str, tokens: int, model: LlamaForCausalLM, asked: Any) -> Row:
    """Fill a cache by a prompt and decode on it; raise `Wrong` if logits after a short one are off."""
    settings, row, on = METHODS.get(name), {}, nullcontext
    if settings is not None:
        own = adapter(model, settings)
        how = {"int8_keys": settings.get("int8_keys", False)}
        on = partial(cskv.attach, model, own, attention=asked.backend, **how)
        row["error"] = _error(name, model, on, partial(cskv.attach, model, own, attention="reference", **how))
    prompt = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    with on():
        static = StaticCache(config=model.config, max_cache_len=tokens + asked.warm + asked.steps * asked.rounds + 8)
        began = clock(model.device)
        for piece in prompt.split(PIECE, dim=1):
            logits = model(piece, **{cache_kwarg(model): static}, logits_to_keep=1).logits[:, -1]
        row["prefill_seconds"] = clock(model.device) - began
        graph = cskv.DecodeGraph(model, static)
        graph.step(logits.argmax(-1, keepdim=True))
        for _ in range(asked.warm):
            graph.step()
        row["nbytes"], speeds = cache_report(static, model).total_bytes, []
        for _ in range(asked.rounds):
            began = clock(model.device)
            for _ in range(asked.steps):
                graph.step()
            speeds.append(asked.steps / (clock(model.device) - began))
    del graph, static
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return row | {"tokens_per_second": summary(speeds)}


def _error(
    name: str,
    model: LlamaForCausalLM,
    on: Callable[[], AbstractContextManager[Any]],
    by_reference: Callable[[], AbstractContextManager[Any]],
) -> float:
    logits = []
    for attached in (on, by_reference):
        with attached():
            ids = torch.randint(3, 100, (1, 200), generator=torch.Generator().manual_seed(1))
            _, held = forward(model, ids[:, :-1])
            logits.append(forward(model, ids[:, -1:], held)[0].float())
    error = float((logits[0] - logits[1]).norm() / logits[1].norm())
    if not error <= TOLERANCE:
        raise Wrong(f"{name}: logits are {error:.3g} off the reference's, at most {TOLERANCE:g}")
    return error


def measure(size: str, name: str, tokens: int, model: Callable[[], LlamaForCausalLM], asked: Any) -> Row:
    """Measure one method after a prompt of one length."""
    with torch.no_grad():
        return {"size": size, "method": name, "tokens": tokens} | measure_one(name, tokens, model(), asked)


def tables(results: dict[str, Any]) -> list[Table]:
    """Show speed and bytes over the uncompressed cache's, and tokens per second."""
    rows, lines = results["rows"].values(), []
    for cell in dict.fromkeys((row["size"], row["tokens"]) for row in rows):
        own = {row["method"]: row for row in rows if (row["size"], row["tokens"]) == cell}
        base = own.get(UNCOMPRESSED)
        for name, row in own.items():
            speed = row["tokens_per_second"]["median"]
            ratio = "" if base is None else f"{speed / base['tokens_per_second']['median']:.2f}x"
            share = "" if base is None else f"{row['nbytes'] / base['nbytes']:.0%}"
            lines.append((cell[0], str(cell[1]), name, f"{speed:.1f}", ratio, share))
    headings = ("model", "tokens", "cache", "tokens/s", f"over {UNCOMPRESSED}", "bytes")
    return [Table("Decoding by CUDA graphs, end to end", headings, lines)]


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, and a job per model, length and method; a model is made by the first of its jobs."""
    if asked.device == "cpu" and not asked.quick:
        raise Unavailable("no GPU; --quick decodes with a tiny model")
    sizes = TINY if asked.quick else {name: SIZES[name] for name in asked.sizes}
    jobs: dict[str, Callable[[], Row]] = {}
    for size, shape in sizes.items():
        model = cache(partial(shape.model, asked.device))
        for _, tokens in sorted(asked.cells, key=lambda cell: -cell[1]):
            for name in (UNCOMPRESSED, *asked.methods, AGAIN):
                jobs[f"{size}, {tokens}, {name}"] = partial(measure, size, name, tokens, model, asked)
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
        "--warm": {"type": int, "default": WARM, "help": "steps before those that are timed"},
        "--rounds": {"type": int, "default": 5, "help": "stretches"},
    },
)

"""Greedy decoding end to end on compressed caches and an uncompressed one: tokens per second after a real prefill.

The model is the bundled one's shape scaled up, with random weights in bfloat16: heads of 64 channels, as many kv heads
as query heads (or fewer, with `--kv-heads`), three times the width in the MLP. Factors are random too: they have the
shapes of real ones, which is all that speed depends on. Every cache has a model of its own, so that all stay attached
and take turns. Logits after a short prompt are first compared with those of `attention="reference"`.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import cskv
from benchmarks.common import Jobs, Row, Wrong
from benchmarks.pages import Table
from benchmarks.speed.problem import llama
from benchmarks.speed.registry import Benchmark
from benchmarks.speed.timing import summary
from cskv.attachment.cache_bytes import cache_report
from cskv.evaluation.forward import clock, forward
from cskv.factorization.commuting import RopePairs, commuting_components
from cskv.models.survey import survey

UNCOMPRESSED = "uncompressed, sdpa"
METHODS: dict[str, dict[str, Any]] = {
    UNCOMPRESSED: {},
    "joint": {},
    "joint, 4 bits": {"k_bits": 4, "v_bits": 4},
    "commuting": {"key_factors": "commuting"},
    "commuting, 4 bits": {"key_factors": "commuting", "k_bits": 4, "v_bits": 4},
    "joint, rebuild": {},
}
TINY = {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 4, "vocabulary": 128}  # of --quick
CHECKED = 200  # tokens of the prompt that outputs are checked on
TOLERANCE = 0.05  # of logits in bfloat16, root mean square over that of the reference's


@dataclass(frozen=True)
class Settings:
    """The model, how long each cache decodes, where, and what attends to latents."""

    hidden: int = 1024
    layers: int = 4
    heads: int = 16
    kv_heads: int = 16
    vocabulary: int = 11_264
    steps: int = 16  # tokens of a stretch
    rounds: int = 4  # stretches; caches take turns with them
    device: str = "cpu"
    backend: str = "auto"

    def model(self) -> LlamaForCausalLM:
        """Make a model of random weights from a fixed seed."""
        torch.manual_seed(0)
        others = {"intermediate_size": 3 * self.hidden, "vocab_size": self.vocabulary}
        head_dim = self.hidden // self.heads
        config = llama(self.heads, self.kv_heads, head_dim, num_hidden_layers=self.layers, **others)
        config._attn_implementation = "sdpa"
        return LlamaForCausalLM(config).to(device=self.device, dtype=torch.bfloat16).eval()


def adapter(model: nn.Module, config: cskv.CSKVConfig) -> cskv.CSKVAdapter:
    """Make random factors of the ranks that `config` asks for."""
    generator, layers, found = torch.Generator().manual_seed(2), {}, survey(model)
    for site in found.sites:
        k_rank, v_rank = config.k_rank(site.kv_dim), config.v_rank(site.kv_dim)
        pair = [_random(site.k, k_rank, generator), _random(site.v, v_rank, generator)]
        if config.key_factors == "commuting":
            pair[0] = commuting_factors(site.kv_dim, site.head_dim, k_rank, generator)
        layers[site.layer_idx] = cskv.LayerFactors(*pair)
    return cskv.CSKVAdapter(config, layers, found.base)


def _random(projection: Any, rank: int, generator: torch.Generator) -> cskv.Factors:
    weight = projection.weight.detach().float().cpu()
    basis = torch.linalg.qr(torch.randn(len(weight), rank, generator=generator)).Q
    return cskv.Factors(basis.T @ weight, basis)


def commuting_factors(kv_dim: int, head_dim: int, rank: int, generator: torch.Generator) -> cskv.Factors:
    """Make random key factors that commute with RoPE."""
    noise = torch.randn(kv_dim, kv_dim, generator=generator, dtype=torch.float64)
    half = torch.arange(head_dim // 2)
    pairs = RopePairs(half, half + head_dim // 2, torch.empty(0, dtype=torch.long))
    return commuting_components(noise @ noise.T / kv_dim, pairs).truncated(rank // 2 * 2)


def config_of(name: str, kv_dim: int) -> cskv.CSKVConfig:
    """Leave out 80 % of the channels; keep a whole number of pairs, so that all methods have the same ranks."""
    density = round(0.2 * kv_dim) // 2 * 2 / kv_dim
    return cskv.CSKVConfig(k_density=density, v_density=density, init="pca", **METHODS[name])


class Runner:
    """One method's model and the cache that it decodes on."""

    def __init__(self, name: str, base: nn.Module, settings: Settings) -> None:
        self.model, self.cache, self.token = copy.deepcopy(base), None, None
        self.adapter: cskv.CSKVAdapter | None = None
        if name != UNCOMPRESSED:
            config = config_of(name, settings.kv_heads * settings.hidden // settings.heads)
            self.adapter = adapter(self.model, config)
            self.attention = "rebuild" if name.endswith("rebuild") else settings.backend
            cskv.attach(self.model, self.adapter, attention=self.attention)

    def error(self, name: str) -> float:
        """Return the relative error of the logits after a short prompt against those of the reference attention.

        It raises `Wrong` if rounding does not explain that.
        """
        if self.adapter is None:
            return 0.0
        own = self._last_logits()
        cskv.detach(self.model)
        with cskv.attach(self.model, self.adapter, attention="reference"):
            expected = self._last_logits()
        cskv.attach(self.model, self.adapter, attention=self.attention)
        error = float((own - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            raise Wrong(f"{name}: logits are {error:.3g} off the reference's, at most {TOLERANCE:g}")
        return error

    def _last_logits(self) -> Tensor:
        ids = torch.randint(3, 100, (1, CHECKED), generator=torch.Generator().manual_seed(1))
        _, cache = forward(self.model, ids[:, :-1])
        return forward(self.model, ids[:, -1:], cache)[0].float()

    def prefill(self, prompt: Tensor) -> float:
        """Fill a fresh cache; seconds."""
        self.cache, self.token = None, prompt
        return self.decode(1)

    def decode(self, steps: int) -> float:
        """Decode greedily on the cache; seconds."""
        began = clock(self.model.device)
        for _ in range(steps):
            logits, self.cache = forward(self.model, self.token, self.cache, last_only=True)
            self.token = logits.argmax(-1)
        return clock(self.model.device) - began


def measure(tokens: int, batch: int, runners: Callable[[], dict[str, Runner]], settings: Settings) -> Row:
    """Measure a row: all methods after a prompt of one length; raise `Wrong` if a method's logits are."""
    row: Row = {"tokens": tokens, "batch": batch, "methods": {}}
    prompt = torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(0))
    ready = runners()
    with torch.inference_mode():
        errors = {name: runner.error(name) for name, runner in ready.items()}
        for name, runner in ready.items():
            seconds = runner.prefill(prompt)
            runner.decode(2)
            held = cache_report(runner.cache, runner.model).total_bytes
            row["methods"][name] = {"error": errors[name], "prefill_seconds": seconds, "nbytes": held}
        found: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(settings.rounds):
            for name, runner in ready.items():
                found[name].append(batch * settings.steps / runner.decode(settings.steps))
    for name, speeds in found.items():
        row["methods"][name]["tokens_per_second"] = summary(speeds)
        ready[name].cache = None
    gc.collect()
    return row


def tables(results: dict[str, Any]) -> list[Table]:
    """Show speed and bytes over the uncompressed cache's; on a GPU, tokens per second too."""
    rows = sorted(results["rows"].values(), key=lambda row: (row["batch"], row["tokens"]))

    def show(row: Row, name: str) -> str:
        own, base = row["methods"].get(name), row["methods"][UNCOMPRESSED]
        if own is None:
            return ""
        speed, other = own["tokens_per_second"]["median"], base["tokens_per_second"]["median"]
        absolute = f", {speed:.0f}/s" if results["settings"]["device"] == "cuda" else ""
        return f"{speed / other:.2f}x{absolute} ({own['nbytes'] / base['nbytes']:.0%})"

    cells = [(name, *(show(row, name) for row in rows)) for name in METHODS]
    title = f"Tokens per second over {UNCOMPRESSED} (bytes over its bytes)"
    return [Table(title, ("cache", *(f"batch {row['batch']}, {row['tokens']}" for row in rows)), cells)]


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings and a job per length and batch size; the models are made by the first of them."""
    size = {**TINY, "steps": 2, "rounds": 2} if asked.quick else {"kv_heads": asked.kv_heads}
    settings = Settings(**size, device=asked.device, backend=asked.backend)

    @cache
    def runners() -> dict[str, Runner]:
        model = settings.model()
        return {name: Runner(name, model, settings) for name in asked.methods}

    jobs = {f"{batch} x {tokens}": partial(measure, tokens, batch, runners, settings) for batch, tokens in asked.cells}
    return asdict(settings) | {"threads": torch.get_num_threads()}, jobs


BENCHMARK = Benchmark(
    plan,
    tables,
    "a tiny model, prompts of 128 tokens",
    whole=((1024, 4096, 16_384), (1,)),
    small=((128,), (1,)),
    methods=tuple(METHODS),
    baselines=(UNCOMPRESSED,),
    options={"--kv-heads": {"type": int, "default": 16, "help": "of 16 query heads"}},
)

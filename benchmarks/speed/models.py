"""Greedy decoding of real models on real prompts: tokens per second on compressed caches and an uncompressed one.

    python scripts/fetch_model.py smollm2 models/smollm2
    python -m benchmarks.speed models --models smollm2

The prompt is the beginning of Python's own documentation. Factors are random: they have the shapes of real ones, which
is all that speed depends on. One model serves all caches, compressors being attached in turn, and caches take turns
with stretches of greedy decoding. Each compressor's logits are first compared with those of `attention="reference"`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import cskv
from benchmarks.common import ROOT, Jobs, Row, Wrong
from benchmarks.pages import Table
from benchmarks.speed.decode import cpu_kernels
from benchmarks.speed.generation import METHODS as ALL
from benchmarks.speed.generation import TOLERANCE, UNCOMPRESSED, adapter, config_of
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.timing import summary
from cskv.attachment.cache_bytes import cache_report
from cskv.data.offline import documents
from cskv.evaluation.forward import clock, forward

METHODS = tuple(name for name in ALL if not name.endswith("rebuild"))
MODELS = ("smollm2", "qwen2.5-coder-1.5b")
CHECKED = 200  # tokens of the prompt that outputs are checked on
STEPS = 16  # tokens of a stretch
PAGES = 60  # of the documentation


def prompt() -> str:
    """Return the beginning of Python's documentation: more tokens than any prompt takes."""
    return "\n\n".join(text for _, text in islice(documents("train"), PAGES))


class Subject:
    """A model, its prompt, and the adapters of all methods."""

    def __init__(self, name: str, dtype: torch.dtype, methods: tuple[str, ...]) -> None:
        folder = ROOT / "models" / name
        if not (folder / "config.json").is_file():
            raise Unavailable(f"{folder} holds no model: python scripts/fetch_model.py {name} models/{name}")
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        config = self.model.config
        kv_dim = config.num_key_value_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        self.adapters = {n: adapter(self.model, config_of(n, kv_dim)) for n in methods if n != UNCOMPRESSED}
        self.ids: Tensor = AutoTokenizer.from_pretrained(folder)(prompt(), return_tensors="pt").input_ids

    @contextmanager
    def compressed(self, method: str, attention: str = "auto") -> Iterator[None]:
        """Attach a method's compressor for a while."""
        if method == UNCOMPRESSED:
            yield
            return
        with cskv.attach(self.model, self.adapters[method], attention=attention):
            yield

    def error(self, method: str) -> float:
        """Return the relative error of the logits after a short prompt; raise `Wrong` if rounding is not the reason."""
        found = []
        for attention in ("auto", "reference"):
            with self.compressed(method, attention):
                _, held = forward(self.model, self.ids[:, : CHECKED - 1])
                found.append(forward(self.model, self.ids[:, CHECKED - 1 : CHECKED], held)[0].float())
        error = float((found[0] - found[1]).norm() / found[1].norm())
        if not error <= TOLERANCE:
            raise Wrong(f"{method}: logits are {error:.3g} off the reference's, at most {TOLERANCE:g}")
        return error


def measure(tokens: int, subject: Any, methods: tuple[str, ...], rounds: int) -> Row:
    """Measure a row: all methods of a model after a prompt of one length."""
    ready: Subject = subject()
    row: Row = {"tokens": tokens, "methods": {}}
    caches, last, speeds = {}, {}, {name: [] for name in methods}
    with torch.inference_mode():
        for name in methods:
            with ready.compressed(name):
                began = clock(ready.model.device)
                logits, caches[name] = forward(ready.model, ready.ids[:, :tokens], None, last_only=True)
                seconds = clock(ready.model.device) - began
                last[name] = logits.argmax(-1)
                _decode(ready, caches, last, name, 2)
                held = cache_report(caches[name], ready.model).total_bytes
            row["methods"][name] = {"error": ready.error(name), "prefill_seconds": seconds, "nbytes": held}
        for _ in range(rounds):
            for name in methods:
                with ready.compressed(name):
                    _decode(ready, caches, last, name, 2)  # what was attached anew is warm again
                    speeds[name].append(STEPS / _decode(ready, caches, last, name, STEPS))
    for name, own in speeds.items():
        row["methods"][name]["tokens_per_second"] = summary(own)
    caches.clear()
    gc.collect()
    return row


def _decode(ready: Subject, caches: dict[str, Any], last: dict[str, Tensor], name: str, steps: int) -> float:
    began = clock(ready.model.device)
    for _ in range(steps):
        logits, caches[name] = forward(ready.model, last[name], caches[name], last_only=True)
        last[name] = logits.argmax(-1)
    return clock(ready.model.device) - began


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Show speed and bytes over the uncompressed cache's."""
    rows = dict(sorted(results["rows"].items(), key=lambda row: (MODELS.index(row[0].split(",")[0]), row[1]["tokens"])))

    def show(row: Row, name: str) -> str:
        own, base = row["methods"].get(name), row["methods"][UNCOMPRESSED]
        if own is None:
            return ""
        speed = own["tokens_per_second"]["median"] / base["tokens_per_second"]["median"]
        return f"{speed:.2f}x ({own['nbytes'] / base['nbytes']:.0%})"

    lines = [(name, *(show(row, name) for row in rows.values())) for name in METHODS]
    title = f"Tokens per second over {UNCOMPRESSED} (bytes over its bytes)"
    return [Table(title, ("cache", *rows), [line for line in lines if any(line[1:])])]


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, and a job per model and length of the prompt."""
    dtype, methods = getattr(torch, asked.dtype), tuple(asked.methods)

    @cache
    def subject(name: str) -> Subject:
        subject.cache_clear()  # two models may not fit
        return Subject(name, dtype, methods)

    jobs = {
        f"{name}, {tokens}": partial(
            measure, tokens, partial(subject, name), methods, 1 if asked.quick else asked.rounds
        )
        for name in asked.models
        for _, tokens in asked.cells
    }
    return {"dtype": asked.dtype, "threads": torch.get_num_threads(), "kernels": cpu_kernels()}, jobs


BENCHMARK = Benchmark(
    plan,
    tables,
    "prompts of 128 tokens, one round",
    whole=((1024, 4096, 16_384), (1,)),
    small=((128,), (1,)),
    methods=METHODS,
    baselines=(UNCOMPRESSED,),
    options={
        "--models": {"nargs": "+", "choices": MODELS, "default": list(MODELS)},
        "--dtype": {"choices": ("bfloat16", "float32"), "default": "bfloat16"},
        "--rounds": {"type": int, "default": 4, "help": "stretches of 16 tokens that caches take turns with"},
    },
)

"""Few-bit latents against post-training quantisation and transformers' quantised cache, on the bundled model.

    pip install -e '.[peers]'             # hqq and optimum-quanto, for the rows to compare with
    python benchmarks/quantised.py        # measures what is missing in results/quantised.json, then writes the tables
    python benchmarks/quantised.py --report

Every row is one cache: LongEval-lines accuracy through `generate`, perplexity of held-out text as the cache is read,
and the bytes that are allocated after a prompt of 1920 tokens in bfloat16. Two seeds pick the text and the
questions.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from common import measure_missing, read_results

import cskv
from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.compression.budget import allocate_widths
from cskv.compression.divergence import Divergence
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.data.lines import make_case
from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source
from cskv.demo.text import mixed_source
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.evaluation.longeval import evaluate_lines
from cskv.evaluation.perplexity import perplexity, token_sequences
from cskv.evaluation.reconstruction import reconstruction_losses
from cskv.methods.quantized import quantized_cache
from cskv.models.survey import survey
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tinymodel" / "checkpoint"
RESULTS = HERE / "results" / "quantised.json"
SEEDS = (0, 1)
NUM_LINES, CASES, BATCH = 200, 50, 5
QAT = TrainingSettings(learning_rate=1e-3, warmup_steps=10, schedule="cosine", batch_size=2)
DISTILLED = TrainingSettings(objective="distillation", learning_rate=3e-4, warmup_steps=5, schedule="cosine")
QAT_SAMPLES, DISTILLATION_SAMPLES, SAMPLE_LEN = 400, 96, 1024


@dataclass(frozen=True)
class Row:
    """One cache.

    Attributes:
        settings: of `CSKVConfig` beside window and group; None for another library's cache or the uncompressed one.
        ratio: the byte budget of mixed widths.
        training: "", "QAT" (reconstruction) or "distilled" (end to end), both through the grid.
        peer: backend and bits of transformers' quantised cache.
    """

    name: str
    settings: dict[str, Any] | None = None
    ratio: float | None = None
    training: str = ""
    peer: tuple[str, int] | None = None


def _cskv_rows() -> list[Row]:
    uniform = {
        bits: {"k_density": 0.2, "v_density": 0.2, "init": "pca", "k_bits": bits, "v_bits": bits} for bits in (16, 4, 2)
    }
    mixed = {"init": "weighted-pca", "mixed_widths": True}
    small = {"k_density": 0.1406, "v_density": 0.125, "init": "pca", "k_bits": 4, "v_bits": 4}  # the bytes of 4.4 %
    rows = [Row("20 % of the channels, 16 bits", uniform[16])]
    for bits in (4, 2):
        rows += [
            Row(f"20 % x {bits} bits, post-training", uniform[bits]),
            Row(f"20 % x {bits} bits, QAT", uniform[bits], training="QAT"),
            Row(f"20 % x {bits} bits, QAT end to end", uniform[bits], training="distilled"),
        ]
    rows += [
        Row("13 % x 4 bits, post-training", small),
        Row("13 % x 4 bits, QAT end to end", small, training="distilled"),
        Row("mixed widths 4.4 %, post-training", mixed, ratio=0.044),
        Row("mixed widths 4.4 %, QAT", mixed, ratio=0.044, training="QAT"),
        Row("mixed widths 4.4 %, QAT end to end", mixed, ratio=0.044, training="distilled"),
    ]
    return rows + [
        Row(f"mixed widths {100 * ratio:g} %, post-training", mixed, ratio=ratio) for ratio in (0.064, 0.12, 0.24)
    ]


PEERS = [
    Row(f"QuantizedCache {backend}, {bits} bits", peer=(backend, bits))
    for backend in ("hqq", "quanto")
    for bits in (4, 2)
]
ROWS = (Row("uncompressed"), *PEERS, *_cskv_rows())


class Bench:
    """The model and the material of one seed."""

    def __init__(self, model: Any, half: Any, tokenizer: Any, seed: int) -> None:
        self.model, self.half, self.tokenizer, self.seed = model, half, tokenizer, seed
        self.divergence = Divergence(survey(model))
        self.held_out = token_sequences(tokenizer, open_source("offline", "heldout").read(seed), 1024, 12)
        self.cases = [make_case(NUM_LINES, 1000 * seed + i) for i in range(CASES)]
        self.prompt = tokenizer(self.cases[0].prompt, return_tensors="pt").input_ids
        self.statistics = calibrate(model, self.samples(32))
        self._mixed: dict[float, CSKVAdapter] = {}

    def samples(self, number: int) -> TokenSamples:
        """Mixed text of the seed."""
        return TokenSamples(mixed_source(NUM_LINES), self.tokenizer, number, SAMPLE_LEN, self.seed)

    def adapter(self, row: Row) -> CSKVAdapter | None:
        """The adapter of a row, trained where it is to be."""
        if row.settings is None:
            return None
        config = CSKVConfig(window=32, group=32, **row.settings)
        if row.ratio is None:
            adapter = initialise(self.model, config, self.statistics)
        else:
            if row.ratio not in self._mixed:
                samples = list(self.samples(8))
                self._mixed[row.ratio] = allocate_widths(
                    self.model, config, self.statistics, samples, row.ratio
                ).adapter
            adapter = copy.deepcopy(self._mixed[row.ratio])
        if row.training == "QAT":
            train(self.model, adapter, self.samples(QAT_SAMPLES), QAT)
        elif row.training == "distilled":
            train(self.model, adapter, self.samples(DISTILLATION_SAMPLES), DISTILLED)
        return adapter

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of one row."""
        began = time.perf_counter()
        adapter = self.adapter(row)
        figures: dict[str, Any] = {"seconds": time.perf_counter() - began}
        new_cache = None
        if row.peer is not None:
            new_cache = partial(quantized_cache, self.model, row.peer[0], nbits=row.peer[1])
        if adapter is not None:
            figures["kl"] = self.divergence.mean(adapter, self.held_out)
            losses = reconstruction_losses(self.model, adapter, self.held_out)
            figures["loss"] = {"k": sum(loss.k for loss in losses), "v": sum(loss.v for loss in losses)}
            if adapter.config.is_quantised:
                figures["bits"] = [[grid.bits_per_latent for grid in adapter.grids(i)] for i in adapter.layer_indices]
        with attached(self.model, adapter):
            text = perplexity(self.model, self.held_out, chunk=32, first_chunk=64, batch_size=4, new_cache=new_cache)
            lines = evaluate_lines(
                self.model, self.tokenizer, self.cases, batch_size=BATCH, max_new_tokens=16, new_cache=new_cache
            )
        if row.peer is not None:
            new_cache = partial(quantized_cache, self.half, row.peer[0], nbits=row.peer[1])
        with attached(self.half, adapter):
            size = cache_after_prefill(self.half, self.prompt, new_cache=new_cache)
        accuracy = {"accuracy": lines.accuracy, "low": lines.low, "high": lines.high, "cases": lines.n}
        return figures | accuracy | {"perplexity": text.ppl, "cache": size.to_dict()}


def attached(model: Any, adapter: CSKVAdapter | None) -> AbstractContextManager[Any]:
    """The compressor on a model inside the block; nothing where there is none."""
    return nullcontext() if adapter is None else cskv.attach(model, adapter)


def jobs() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of a row -> how it is measured."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, half = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=d).eval() for d in (torch.float32, torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    bench = cache(lambda seed: Bench(model, half, tokenizer, seed))
    return {
        f"{seed}/{row.name}": lambda s=seed, r=row: {"seed": s, "name": r.name} | bench(s).measure(r)
        for seed in SEEDS
        for row in ROWS
    }


def main(report: Annotated[bool, typer.Option("--report", help="Only write the tables again.")] = False) -> None:
    """Measure what is missing, then write the table and the figure of docs/quantisation.md."""
    from quantised_report import write_report

    results = read_results(RESULTS)
    if not report:
        measure_missing(RESULTS, results, jobs())
    write_report(results, [row.name for row in ROWS])


if __name__ == "__main__":
    typer.run(main)

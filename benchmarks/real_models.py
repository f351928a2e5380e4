"""What closed-form factors and budgets lose on a real language model, in nats per token, beside other caches.

    python scripts/fetch_model.py smollm2 models/smollm2
    python benchmarks/real_models.py --model models/smollm2 --name smollm2 --calibration train.txt --heldout test.txt

Texts are files or the names that `cskv calibrate --training-dataset` takes (wikitext2, offline, ...). Every row is kept
in benchmarks/results/real-models-NAME.json as it is measured, and what is there is not measured again; statistics and
adapters are kept in outputs/real-models. `--only` picks rows by a part of their names, such as "lines" or "trained".
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import RESULTS, ROOT, Row, run
from real_models_report import tables
from real_models_text import Texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import cskv
from cskv.compression.budget import Budget, allocate, ratio_of
from cskv.data.lines import make_case
from cskv.errors import CSKVError
from cskv.evaluation.agreement import agreement
from cskv.evaluation.tasks import evaluate_cases, in_chat
from cskv.methods.method import Method, compressed, uncompressed
from cskv.methods.quantized import quantized
from cskv.models.calls import AttentionCall
from cskv.models.probe import SiteRecipe
from cskv.models.sites import AttentionSite
from cskv.models.survey import survey
from cskv.reading.divergence import Divergence
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train

DEFAULTS = cskv.CSKVConfig()
BUDGETS, DENSITIES = (0.2, 0.1, 0.05), (0.5, 0.2)
LEARNING_RATES = (1e-4, 2e-5)


class Fp8Tokens:
    """Keys and values as a cache of float8_e4m3 numbers gives them back, without scales, as vLLM's default is."""

    config = cskv.CSKVConfig(window=0, group=1, sinks=0)

    def keys(self, _site: AttentionSite, _recipe: SiteRecipe, _call: AttentionCall, keys: torch.Tensor) -> torch.Tensor:
        return keys.to(torch.float8_e4m3fn).to(keys.dtype)

    def values(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall) -> torch.Tensor:
        values = recipe.values.heads(site.v.select(site.v.linear(call.x)), None, None)
        return values.to(torch.float8_e4m3fn).to(values.dtype)


class Bench:
    """A model, its texts, and what is made of them once."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(given.model)
        self.texts = Texts(self.tokenizer, given.tokens)
        self.folder = ROOT / "outputs" / "real-models" / given.name
        self.surveyed = survey(self.model)
        self.divergence = Divergence(self.surveyed)
        self.exact = functools.cache(self._exact)
        self.statistics = functools.cache(self._statistics)

    def jobs(self) -> dict[str, Callable[[], Row]]:
        """Return what makes each row."""
        own, other = self.given.calibration, self.given.other
        jobs: dict[str, Callable[[], Row]] = {}
        for density in DENSITIES:
            for sinks in (0, 4):
                jobs[f"weighted PCA, {density:.0%} of the channels, {sinks} sinks"] = functools.partial(
                    self.uniform, "weighted-pca", density, sinks
                )
            jobs[f"Fisher PCA, {density:.0%} of the channels"] = functools.partial(
                self.uniform, "fisher-pca", density, 4
            )
            jobs[f"Fisher PCA, ranks dealt out, {density:.0%} of the channels"] = functools.partial(
                self.budget, density, own, ranks_only=True
            )
        for ratio in BUDGETS:
            jobs[f"{ratio:.0%} of the bytes"] = functools.partial(self.budget, ratio, own)
        for ratio in BUDGETS[:2] if other else ():
            jobs[f"{ratio:.0%} of the bytes, calibrated on other text"] = functools.partial(self.budget, ratio, other)
            jobs[f"{ratio:.0%} of the bytes, calibrated on both"] = functools.partial(
                self.budget, ratio, f"{own}+{other}"
            )
        for ratio, rate in itertools.product(BUDGETS, LEARNING_RATES) if self.given.train else ():
            jobs[f"trained at {rate:g}, {ratio:.0%} of the bytes"] = functools.partial(self.trained, ratio, rate)
        jobs["peer: fp8"] = self.fp8
        for bits in (4, 2):
            jobs[f"peer: QuantizedCache, {bits} bits"] = functools.partial(self.quantised, bits)
        for ratio in BUDGETS:
            jobs[f"peer: cskv, {ratio:.0%} of the bytes, through the cache"] = functools.partial(self.through, ratio)
        for budget in (None, *BUDGETS[:2]) if self.given.lines else ():
            name = "uncompressed" if budget is None else f"{budget:.0%} of the bytes"
            jobs[f"lines: {name}"] = functools.partial(self.lines, budget)
        return {name: job for name, job in jobs.items() if self.given.only in name}

    def uniform(self, init: str, density: float, sinks: int) -> Row:
        config = replace(DEFAULTS, init=init, k_density=density, v_density=density, sinks=sinks)
        return self.measured(cskv.initialise(self.model, config, self.statistics(self.given.calibration)))

    def budget(self, ratio: float, text: str, *, ranks_only: bool = False) -> Row:
        return self.measured(self.allocated(ratio, text, ranks_only=ranks_only))

    def allocated(self, ratio: float, text: str, *, ranks_only: bool = False) -> cskv.CSKVAdapter:
        """Spend a budget, or load the adapter that did."""
        folder = self.folder / f"{self.texts.slug(text)}-{ratio:g}{'-ranks' if ranks_only else ''}"
        if (folder / "config.json").exists():
            return cskv.CSKVAdapter.from_pretrained(folder)
        samples = self.texts.samples(text, 8, start=self.given.samples)
        found = allocate(self.model, DEFAULTS, self.statistics(text), samples, Budget(ratio), ranks_only=ranks_only)
        found.adapter.metrics |= {"predicted_kl": found.predicted_kl, "measured_kl": found.measured_kl}
        found.adapter.save_pretrained(folder)
        return found.adapter

    def trained(self, ratio: float, rate: float) -> Row:
        """Distil a budget's adapter, and say what it lost before."""
        adapter = self.allocated(ratio, self.given.calibration)
        before = {
            f"{name}_before": value for name, value in self.measured(adapter).items() if name in ("kl", "kl_other")
        }
        samples = self.texts.samples(self.given.calibration, self.given.train)
        settings = TrainingSettings(learning_rate=rate, schedule="cosine", objective="distillation", warmup_steps=4)
        result = train(self.model, adapter, samples, settings, output=self.folder / f"training-{ratio:g}-{rate:g}")
        return self.measured(adapter) | before | {"steps": result.steps, "training_samples": self.given.train}

    def measured(self, adapter: cskv.CSKVAdapter) -> Row:
        """Measure the divergence on held-out text, and on other held-out text where there is some."""
        row: Row = {"ratio": ratio_of(adapter), **adapter.metrics}
        for name, text in (("kl", self.given.heldout), ("kl_other", self.given.other_heldout)):
            if text is not None:
                row |= self.kl(adapter, name, text)
        return row

    def kl(self, old: Any, name: str, text: str) -> Row:
        samples, exact = self.exact(text)
        found = [self.divergence.kl(old, sample[None], exact=own).item() for sample, own in zip(samples, exact)]
        return {name: fmean(found), f"{name}_of_texts": found}

    @torch.no_grad()
    def fp8(self) -> Row:
        with torch.no_grad():
            return {"ratio": 0.5} | self.kl(Fp8Tokens(), "kl", self.given.heldout)

    def quantised(self, bits: int) -> Row:
        """Read through transformers' QuantizedCache, whose groups of 64 numbers have a scale and a zero in 16 bits."""
        return self.read(quantized(bits), (bits + 2 * 16 / 64) / 16)

    def through(self, ratio: float) -> Row:
        adapter = self.allocated(ratio, self.given.calibration)
        return self.read(compressed(adapter, "cskv"), ratio_of(adapter))

    def read(self, method: Method, ratio: float) -> Row:
        """Read held-out texts through a cache, its first tokens in one piece and then a group at a time."""
        texts = torch.stack(self.texts.samples(self.given.heldout, self.given.texts, heldout=True))
        first = DEFAULTS.sinks + DEFAULTS.window + DEFAULTS.group
        found = agreement(self.model, method, texts, chunk=DEFAULTS.group, first_chunk=first)
        return {"ratio": ratio, "kl": fmean(found.kl), "kl_of_texts": list(found.kl), "top1": fmean(found.top1)}

    def lines(self, ratio: float | None) -> Row:
        """Ask LongEval questions in the chat template, the question in the prompt."""
        cases = [in_chat(self.tokenizer, make_case(self.given.lines, seed).as_case()) for seed in range(50)]
        method = uncompressed() if ratio is None else compressed(self.allocated(ratio, self.given.calibration), "cskv")
        with method.on(self.model):
            found = evaluate_cases(self.model, self.tokenizer, cases, batch_size=1, max_new_tokens=24)
        kept = ("n", "score", "low", "high", "prompt_tokens")
        return {"ratio": ratio or 1.0, "lines": self.given.lines, **{name: getattr(found, name) for name in kept}}

    @torch.no_grad()
    def _exact(self, text: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        samples = self.texts.samples(text, self.given.texts, heldout=True)
        return samples, self.divergence.exact(samples)

    def _statistics(self, text: str) -> cskv.Statistics:
        path = self.folder / f"{self.texts.slug(text)}-{self.given.samples}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = self.texts.samples(text, self.given.samples)
            kept = path.with_name(f"{path.name}.unfinished")
            cskv.calibrate(self.model, samples, DEFAULTS, source=text, kept=kept, progress=_say).save(path)
        return cskv.Statistics.load(path)


def _say(done: int, total: int | None) -> None:
    print(f"calibrated on {done} of {total} samples", file=sys.stderr, flush=True)


def main() -> int:
    """Measure what is lacking, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--calibration", default="wikitext2", help="text to calibrate on")
    parser.add_argument("--heldout", default="wikitext2", help="text to measure on; of a name, its held-out part")
    parser.add_argument("--other", help="text of another kind to calibrate on as well")
    parser.add_argument("--other-heldout", help="text of another kind to measure on as well")
    parser.add_argument("--samples", type=int, default=32, help="of calibration text")
    parser.add_argument("--texts", type=int, default=8, help="held-out texts")
    parser.add_argument("--tokens", type=int, default=512, help="of a sample or text")
    parser.add_argument("--train", type=int, default=0, help="samples to distil on; 0 leaves training out")
    parser.add_argument("--lines", type=int, default=0, help="lines of LongEval records; 0 leaves them out")
    parser.add_argument("--only", default="", help="part of the rows' names")
    parser.add_argument("--out", type=Path, help="result file")
    given = parser.parse_args()
    out = given.out or RESULTS / f"real-models-{given.name}.json"
    try:
        bench = Bench(given)
        settings = {name: getattr(given, name) for name in ("name", "samples", "texts", "tokens")}
        for role in ("calibration", "heldout", "other", "other_heldout"):
            settings[role] = bench.texts.describe(getattr(given, role))
        return run(out, settings, bench.jobs(), tables)
    except CSKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""The demo's steps in order."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.budget import Budget, allocate_each
from cskv.config import CSKVConfig
from cskv.data.samples import TokenSamples
from cskv.errors import CSKVError, DataError
from cskv.evaluation.environment import environment
from cskv.evaluation.identity import model_facts
from cskv.evaluation.material import Material
from cskv.evaluation.pooling import pool
from cskv.evaluation.results import Run, open_run
from cskv.evaluation.runner import evaluate
from cskv.evaluation.settings import AGREEMENT
from cskv.evaluation.speed import measure_decode
from cskv.methods.method import Method, compressed, uncompressed
from cskv.methods.quantized import quantized
from cskv.plots import plot_divergence
from demo.settings import NEEDLES, DemoSettings
from demo.show import DECODING, results_table, side_by_side, summary
from demo.stages import Stage, stage

FIGURE, RESULTS, STATISTICS, ADAPTERS = "kl.png", "results.json", "statistics.safetensors", "adapters"


class Demo:
    """Compresses one model and shows what that costs.

    An interrupted run goes on from its statistics, adapters and rows; a finished one, or one of another model or other
    settings, begins anew.

    Args:
        model: a causal language model, nothing attached.
        tokenizer: its own.
        settings: how much is done.
        out: the folder to write.
        console: what is printed to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: DemoSettings,
        out: Path,
        console: Console,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.out, self.console = model, tokenizer, settings, out, console
        self._prompt = Material(tokenizer, settings.evaluation).texts(settings.evaluation.text_tokens[0], settings.seed)

    def run(self) -> dict[str, Any]:
        """Do it all, and return what the last line says.

        Raises:
            CSKVError: the model cannot be compressed, the text is too short, or the folder cannot be written.
        """
        began = time.perf_counter()
        run = self._begin()
        self._make_adapters()
        methods = self._methods()
        small = [method for method in methods if method.facts["kind"] != "quantised"]
        with stage(self.console, "generate") as shown:
            panels = side_by_side(self.model, self.tokenizer, small, self._prompt[:1], self.settings, shown.advance)
        self.console.print(*panels, sep="\n")
        with stage(self.console, f"measure {len(methods)} caches") as shown:
            self._measure(methods, run, shown)
        lines, seconds = summary(run), time.perf_counter() - began
        figure = plot_divergence([p for p in pool(run.rows) if p.task == AGREEMENT], self.out / FIGURE)
        self.console.print(results_table(run, lines, seconds))
        self._say(f"figure: {figure}; `cskv report {run.path} --out {self.out / 'report'}` makes a page")
        return {"rows": lines, "seconds": seconds, "results": str(run.path), "figure": str(figure)}

    def _begin(self) -> Run:
        """Open the result file. It is written at once, since it says what the files beside it are of."""
        given = self.settings.to_dict(), model_facts(self.model), environment().to_dict()
        path = self.out / RESULTS
        try:
            run = open_run(path, *given)
            finished = (self.out / FIGURE).exists()  # which is drawn last
        except DataError:
            finished = True
        if finished or not path.exists():
            for name in (RESULTS, STATISTICS, FIGURE):
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / ADAPTERS, ignore_errors=True)
            run = open_run(path, *given)
        else:
            self._say(f"going on with the interrupted run in {self.out}")
        run.save()
        return run

    def _say(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def _folder(self, ratio: float) -> Path:
        return self.out / ADAPTERS / f"{100 * ratio:g}"

    def _make_adapters(self) -> None:
        settings = self.settings
        count = settings.samples + settings.aside
        source = settings.source
        samples = list(TokenSamples(source, self.tokenizer, count, settings.sample_len, settings.seed))
        path = self.out / STATISTICS
        if not path.exists():
            with stage(self.console, "calibrate") as shown:
                calibrate(
                    self.model,
                    samples[: settings.samples],
                    source=source.name,
                    seed=settings.seed,
                    progress=lambda _done, total: shown.advance(1 / (total or 1)),
                    kept=path.with_suffix(".part"),
                ).save(path)
                shown.note = f"{settings.samples} samples of {settings.sample_len} tokens"
        statistics = Statistics.load(path)
        lacking = [ratio for ratio in settings.budgets if not (self._folder(ratio) / "config.json").exists()]
        if lacking:
            names = ", ".join(f"{100 * ratio:g}" for ratio in lacking)
            with stage(self.console, f"choose {names} % of the bytes") as shown:
                given = self.model, CSKVConfig(), statistics, samples[settings.samples :], [*map(Budget, lacking)]
                for ratio, found in zip(lacking, allocate_each(*given), strict=True):
                    found.adapter.metrics |= {"predicted_kl": found.predicted_kl, "measured_kl": found.measured_kl}
                    found.adapter.save_pretrained(self._folder(ratio))
                    shown.note += f"{', ' if shown.note else 'KL '}{found.measured_kl:.4f}"
                shown.note += " nats on text kept aside"

    def _methods(self) -> list[Method]:
        """Return what is compared; adapters are those of the folders."""
        adapters = [(ratio, CSKVAdapter.from_pretrained(self._folder(ratio))) for ratio in self.settings.budgets]
        methods = [uncompressed(), *(compressed(adapter, "CSKV", ratio) for ratio, adapter in adapters)]
        try:
            return [*methods, quantized(4)]
        except CSKVError as error:
            self._say(f"no row of transformers' quantised cache: {error}")
            return methods

    def _measure(self, methods: list[Method], run: Run, shown: Stage) -> None:
        """Measure all methods, so that what they are compared with is made once, and then time them."""
        evaluation = self.settings.evaluation
        steps = (len(list(evaluation.jobs())) + 1) * len(methods)
        given = self.model, self.tokenizer, methods, evaluation, run
        evaluate(*given, on_work=lambda _what, share: shown.advance(share / steps))
        needles = {(row["method"], row["budget"]): row for row in run.rows if row["task"] == NEEDLES}
        for method in methods:
            row = needles[method.name, method.budget]
            if DECODING not in row:
                with method.on(self.model) as new_cache:
                    timed = self.settings.timed_steps
                    speed = measure_decode(self.model, self._prompt[:1], steps=timed, repeats=1, new_cache=new_cache)
                row[DECODING] = speed.to_dict()
                run.save()
            shown.advance(1 / steps)

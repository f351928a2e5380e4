"""Measure methods on the tasks of an evaluation, row by row; rows that a run has already are not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.attachment.cache_bytes import CacheReport
from cskv.errors import DataError
from cskv.evaluation.agreement import Agreement, agreement
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.evaluation.departure import decoded, departures, reference_texts
from cskv.evaluation.forward import clock
from cskv.evaluation.material import Material
from cskv.evaluation.reference import Reference
from cskv.evaluation.results import Row, Run
from cskv.evaluation.settings import (
    AGREEMENT,
    CONTINUATION,
    DEPARTURE,
    PERPLEXITY,
    TEXT_TASKS,
    EvaluationSettings,
    Job,
)
from cskv.evaluation.tasks import evaluate_cases
from cskv.methods.method import Method
from cskv.models.placement import device_of

OnWork = Callable[[str, float], None]  # what is being measured, and how much of it has just been done, from 0 to 1


def lacks(run: Run, job: Job, name: str, budget: float | None, *, streams: bool = True) -> bool:
    """Tell whether a run has yet to measure a job. Methods that only compress prompts do not read a growing text."""
    return (streams or job.task != PERPLEXITY) and not run.has(method=name, budget=budget, **job._asdict())


def todo(run: Run, methods: Sequence[Method], settings: EvaluationSettings) -> list[tuple[Method, Job]]:
    """List what a run lacks."""
    return [
        (method, job)
        for job in settings.jobs()
        for method in methods
        if lacks(run, job, method.name, method.budget, streams=method.streams)
    ]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method],
    settings: EvaluationSettings,
    run: Run,
    *,
    keep_outputs: bool = True,
    variant: str = "",
    on_work: OnWork | None = None,
) -> None:
    """Measure what a run lacks, and add it to the run, whose file is written after every row.

    Args:
        model: the bare model.
        tokenizer: the model's.
        methods: with different (name, budget).
        settings: what is measured.
        run: from `cskv.evaluation.results.open_run`.
        keep_outputs: keep what was answered to every question.
        variant: added to methods' names in `run.methods`, where each seed has adapters of its own.
        on_work: for a progress bar.

    Raises:
        DataError: two methods are called alike, or there is too little text.
        CSKVError: a method does not fit the model.
    """
    names = [method.label for method in methods]
    alike = sorted({name for name in names if names.count(name) > 1})
    if alike:
        raise DataError(f"several methods are called {', '.join(alike)}; give each a name of its own (NAME=...)")
    for method in methods:
        facts = json.loads(json.dumps(method.facts))  # as they are read back
        if run.methods.setdefault(method.label + variant, facts) != facts:
            raise DataError(
                f"{run.path} holds figures of another method called {method.label}; results are never mixed: give it "
                "a name of its own (NAME=...) or another --output"
            )
    material = Material(tokenizer, settings)
    measure = _Measure(model, tokenizer, settings, material, keep_outputs, on_work or (lambda _what, _share: None))
    for method, job in todo(run, methods, settings):
        run.add(*measure.rows(method, job))


@dataclass
class _Measure:
    """Measures one method on one job; what all methods are compared with is made once."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: EvaluationSettings
    material: Material
    keep_outputs: bool
    on_work: OnWork
    references: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # by size, seed and rows together
    plain: dict[Job, CacheReport] = field(default_factory=dict)  # of the model's own cache

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.model)

    def rows(self, method: Method, job: Job) -> list[Row]:
        """Return the rows of a job."""
        key = {"method": method.name, "budget": method.budget} | job._asdict()
        what = " ".join(str(part) for part in (method.label, job.task, job.size, job.protocol or "") if part)
        if job.task not in TEXT_TASKS:
            return [key | self._questions(method, job, what)]
        figures = self._departure(method, job, what) if job.task == DEPARTURE else self._text(method, job, what)
        common = {name: figures.pop(name) for name in ("cache", "speed")}
        parts: dict[str, dict[str, Any]] = {job.task: figures}
        if job.task == PERPLEXITY:
            shared = {name: figures.pop(name) for name in ("tokens", "reading")}
            likelihood = {name: figures.pop(name) for name in list(figures) if "nll" in name or "perplexity" in name}
            parts = {AGREEMENT: shared | figures, PERPLEXITY: shared | likelihood}
        return [key | {"task": task} | part | common for task, part in parts.items()]

    def _questions(self, method: Method, job: Job, what: str) -> Row:
        cases, device = self.material.cases(job.task, job.size, job.seed), device_of(self.model)
        began = clock(device)
        with method.on(self.model) as new_cache:
            result = evaluate_cases(
                self.model,
                self.tokenizer,
                cases,
                protocol=str(job.protocol),
                batch_size=self.settings.batch_size if method.pads else 1,
                multiple=method.multiple,
                max_new_tokens=self.settings.longest_answer(job.task),
                new_cache=new_cache,
                on_case=lambda done: self.on_work(what, done / len(cases)),
            )
        seconds = clock(device) - began
        prompt = self.tokenizer(cases[0].prompt, return_tensors="pt", verbose=False)["input_ids"]
        row: Row = {name: getattr(result, name) for name in ("n", "score", "low", "high", "prompt_tokens")}
        times = {name: getattr(result, name) for name in ("prefill_seconds", "decode_tokens_per_second")}
        row["speed"] = self._speed(seconds, result.prompt_tokens * result.n) | times
        if job.task != "lines":
            row["cells"] = result.cells()
        if self.keep_outputs:
            row["outputs"] = result.to_dict()["outputs"]
        return row | {"cache": self._cache(method, job, prompt)}

    def _text(self, method: Method, job: Job, what: str) -> Row:
        texts = self.material.texts(job.size, job.seed)
        prefix = job.size - self.settings.continued if job.task == CONTINUATION else 0
        found = self._agreement(method, texts, prefix, what, 1.0)
        speed = self._speed(found.seconds, texts.numel() - len(texts))
        return found.to_dict() | {"speed": speed, "cache": self._cache(method, job, texts[:1])}

    def _departure(self, method: Method, job: Job, what: str) -> Row:
        """Generate with the method, and read the uncompressed model's text with it; each is half of the work."""
        prompts = self.material.texts(job.size, job.seed)
        rows = self.settings.batch_size if method.pads else 1
        reference = self._reference(job, rows, what)
        done, device = 0.0, device_of(self.model)

        def on_tokens(made: int) -> None:
            nonlocal done
            done += (share := made / reference.numel() / 2)
            self.on_work(what, share)

        began = clock(device)
        found = departures(self.model, method, prompts, reference, batch_size=rows, on_tokens=on_tokens)
        speed = self._speed(clock(device) - began, sum(map(len, found.texts)))
        self.on_work(what, 0.5 - done)  # it ends early where all texts have departed
        read = self._agreement(method, torch.cat([prompts, reference], dim=1), job.size, what, 0.5).to_dict()
        kept = ("tokens", "kl", "kl_interval", "top1", "top1_interval", "positions", "reading")
        row = found.to_dict() | {name: read[name] for name in kept}
        if self.keep_outputs:
            row["outputs"] = decoded(self.tokenizer, found, reference)
        return row | {"speed": speed, "cache": self._cache(method, job, prompts[:1])}

    def _reference(self, job: Job, rows: int, what: str) -> Int[Tensor, "texts generated"]:
        """Return the uncompressed model's texts, generated for the first method that needs them."""
        key = job.size, job.seed, rows
        if key not in self.references:
            prompts, count = self.material.texts(job.size, job.seed), self.settings.generated
            self.references[key] = reference_texts(
                self.model, prompts, count, batch_size=rows, on_tokens=lambda _: self.on_work(what, 0.0)
            )
        return self.references[key]

    def _agreement(
        self, method: Method, texts: Int[Tensor, "texts tokens"], prefix: int, what: str, share: float
    ) -> Agreement:
        """Read texts with and without the method, as that share of the work."""
        return agreement(
            self.model,
            method,
            texts,
            reference=self.reference,
            prefix=prefix,
            batch_size=self.settings.batch_size if method.pads else 1,
            on_tokens=lambda done: self.on_work(what, share * done / (texts.numel() - len(texts))),
        )

    def _speed(self, seconds: float, tokens: float) -> dict[str, Any]:
        return {"device": device_of(self.model).type, "seconds": seconds, "tokens_per_second": tokens / seconds}

    def _cache(self, method: Method, job: Job, prompt: Int[Tensor, "1 tokens"]) -> dict[str, Any]:
        """Return the bytes of the cache after a job's first prompt, beside those of the model's own."""
        if job not in self.plain:
            self.plain[job] = cache_after_prefill(self.model, prompt)
        report = plain = self.plain[job]
        tokens = plain.tokens // method.multiple * method.multiple or plain.tokens
        if method.budget is not None:
            with method.on(self.model) as new_cache:
                report = cache_after_prefill(self.model, prompt[:, :tokens], new_cache=new_cache, own=plain)
        uncompressed = plain.total_bytes * tokens // plain.tokens
        facts = report.to_dict() | {"tokens": tokens, "uncompressed_bytes": uncompressed}
        return facts | {"ratio": report.total_bytes / uncompressed, "bytes_per_token": report.total_bytes / tokens}

"""Measure one variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.data.cases import Case
from cskv.data.lines import make_case
from cskv.data.sources import open_source
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.evaluation.perplexity import perplexity, token_sequences
from cskv.evaluation.speed import measure_decode
from cskv.evaluation.tasks import evaluate_cases
from demo.settings import CACHE, DemoSettings, Variant

ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Material:
    """Questions and texts that every variant is measured on, made once.

    Attributes:
        cases: LongEval questions.
        prompt: (1, tokens), the first of them.
        texts: (texts, tokens), held-out documents.
    """

    cases: list[Case]
    prompt: Int[Tensor, "1 tokens"]
    texts: Int[Tensor, "texts tokens"]

    @property
    def work(self) -> int:
        """Units of progress in one variant: cases, and as much again for the rest."""
        return 2 * len(self.cases)


def material(tokenizer: PreTrainedTokenizerBase, settings: DemoSettings) -> Material:
    """Cases by seeds 0, 1, ..., and held-out offline documents in a fixed order."""
    cases = [make_case(settings.num_lines, seed).as_case() for seed in range(settings.cases)]
    prompt = torch.tensor([tokenizer(cases[0].prompt, verbose=False)["input_ids"]])
    texts = open_source("offline", "heldout").read(0)
    return Material(cases, prompt, token_sequences(tokenizer, texts, settings.text_tokens, settings.texts))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variant: Variant,
    settings: DemoSettings,
    on: Material,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Measure the variant's row of the table, JSON-ready, with the details below `details`.

    Args:
        model: with the variant's adapter attached, or none for the uncompressed one.
        advance: called with units of progress, `on.work` in all.
    """
    lines = evaluate_cases(
        model, tokenizer, on.cases, batch_size=settings.batch_size, max_new_tokens=ANSWER_TOKENS, on_case=advance
    )
    fed = len(on.cases) / (on.texts.shape[0] * (on.texts.shape[1] - 1))
    text = perplexity(
        model,
        on.texts,
        chunk=CACHE["group"],
        first_chunk=CACHE["window"] + CACHE["group"],
        batch_size=settings.batch_size,
        on_tokens=lambda tokens: advance(fed * tokens),
    )
    report = cache_after_prefill(model, on.prompt)
    speed = measure_decode(model, on.prompt, steps=CACHE["group"], repeats=settings.speed_repeats)
    return {
        "key": variant.key,
        "name": variant.name,
        "density": variant.density,
        "bytes_per_token": report.bytes_per_token,
        "ratio": report.ratio,
        "num_lines": settings.num_lines,
        "cases": lines.n,
        "accuracy": lines.score,
        "low": lines.low,
        "high": lines.high,
        "perplexity": text.ppl,
        "tokens_per_second": speed.tokens_per_second,
        "details": {
            "cache": report.to_dict(),
            "lines": lines.to_dict(),
            "perplexity": asdict(text),
            "speed": speed.to_dict(),
        },
    }


def example(row: dict[str, Any], on: Material) -> dict[str, Any]:
    """Describe the answer to the first question: the prompt's end, what followed, and the bytes that were held."""
    first, cache = row["details"]["lines"]["outputs"][0], row["details"]["cache"]
    return {
        "prompt_end": on.cases[0].question.lstrip(),
        "output": first["output"],
        "expected": on.cases[0].answers[0],
        "cache_bytes": cache["total_bytes"],
        "uncompressed_bytes": cache["uncompressed_bytes"],
        "tokens": cache["tokens"],
    }

"""Quality of adapters and caches on the bundled model: the measurements of `closed_form`, `quantised` and `grids`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# Threads that spin while they wait halve the speed of whatever else runs on the machine; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from adapters import NUM_LINES, Maker
from common import MODEL, Jobs, Row, measure_missing, read_results
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

import cskv
from cskv.compression.divergence import Divergence
from cskv.data.lines import make_case
from cskv.data.sources import open_source
from cskv.evaluation.perplexity import perplexity, token_sequences
from cskv.evaluation.reconstruction import reconstruction_losses
from cskv.evaluation.tasks import evaluate_cases
from cskv.models.survey import survey

SEEDS = (0, 1)
CASES, BATCH = 50, 5
TEXTS, TEXT_TOKENS = 12, 1024


def load(**options: Any) -> Any:
    """Return the bundled model."""
    return AutoModelForCausalLM.from_pretrained(MODEL, **options).eval()


class Bench(Maker):
    """The model and the material of one seed, which picks the text and the questions."""

    def __init__(self, model: Any, seed: int, texts: int = TEXTS) -> None:
        super().__init__(model, AutoTokenizer.from_pretrained(MODEL), seed)
        self.surveyed = survey(model)
        self.divergence = Divergence(self.surveyed)
        self.held_out = self.tokens(open_source("offline", "heldout").read(seed), TEXT_TOKENS, texts)
        self.cases = [make_case(NUM_LINES, 1000 * seed + index).as_case() for index in range(CASES)]

    def tokens(self, texts: Iterable[str], length: int, count: int) -> Tensor:
        """Return (count, length) token ids, the heads of the texts that are long enough."""
        return token_sequences(self.tokenizer, texts, length, count)

    def losses(self, adapter: cskv.CSKVAdapter) -> dict[str, list[float]]:
        """Return the reconstruction losses of held-out keys and values, by layer."""
        found = reconstruction_losses(self.model, adapter, self.held_out)
        return {"k": [loss.k for loss in found], "v": [loss.v for loss in found]}

    def through_cache(self, adapter: cskv.CSKVAdapter | None, new_cache: Callable[[], Cache] | None = None) -> Row:
        """Measure perplexity and LongEval accuracy through a compressed cache, another one, or the model's own."""
        with nullcontext() if adapter is None else cskv.attach(self.model, adapter):
            text = perplexity(self.model, self.held_out, chunk=32, first_chunk=64, batch_size=4, new_cache=new_cache)
            lines = evaluate_cases(
                self.model, self.tokenizer, self.cases, batch_size=BATCH, max_new_tokens=16, new_cache=new_cache
            )
        figures = {"accuracy": lines.score, "low": lines.low, "high": lines.high, "cases": lines.n}
        return figures | {"perplexity": text.ppl}


def measure(path: Path, report: bool, jobs: Callable[[], Jobs]) -> dict[str, Any]:
    """Read results, and measure what they lack unless only a report is wanted; `jobs` loads models."""
    results = read_results(path)
    if not report:
        measure_missing(path, results, jobs())
    return results

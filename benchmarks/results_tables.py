"""The tables that are made of `make results`, as Markdown; a row is one method at one budget, all seeds pooled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from pages import Table
from results_methods import TRAINED, WINDOWS, split_names

from cskv.evaluation.decoding import CONTEXT_FIRST, IN_PREFILL
from cskv.evaluation.pooling import Pooled, Value

BUDGET_NAMES = {None: "0 %", 0.5: "50 %", 0.4: "60 %", 0.3: "70 %", 0.2: "80 %", 0.1: "90 %", 0.05: "95 %"}
PAPER_80 = {"StreamingLLM": 6, "H2O-like": 18, "ASVD": 26, TRAINED: 92}
PAPER_WINDOWS = {2: 77, 8: 85, 32: 92, 128: 94, 1024: 95}
PAPER_QAT = {0.5: 96, 0.4: 94, 0.3: 92, 0.2: 90}


class Points:
    """Pooled results by what they are of."""

    def __init__(self, points: Iterable[Pooled]) -> None:
        self.points = list(points)

    def find(self, method: str, budget: float | None, task: str, protocol: str | None = None) -> Pooled | None:
        """Return the result of these, or None; of several sizes the largest."""
        found = [p for p in self.points if (p.method, p.task, p.protocol) == (method, task, protocol)]
        found = [p for p in found if p.budget == budget or (p.budget and budget and abs(p.budget - budget) < 1e-9)]
        return max(found, key=lambda p: p.size, default=None)

    def score(self, method: str, budget: float | None, protocol: str = IN_PREFILL, task: str = "lines") -> Value | None:
        """Return the accuracy, if there is one."""
        point = self.find(method, budget, task, protocol)
        return None if point is None else point.score

    def perplexity(self, method: str, budget: float) -> str:
        """Format the perplexity of whole texts."""
        point = self.find(method, budget, "perplexity")
        return "–" if point is None or point.perplexity is None else f"{point.perplexity.mean:.2f}"

    def methods(self, *budgets: float | None) -> list[tuple[str, float | None]]:
        """Return (method, budget) in order of first appearance, budget by budget."""
        pairs = dict.fromkeys((p.method, p.budget) for p in self.points)
        return [pair for budget in budgets for pair in pairs if pair[1] == budget]


def percent(value: Value | None) -> str:
    """Format a score with its interval."""
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{100 * value.mean:.0f} %"
    return f"{100 * value.mean:.0f} % ({100 * value.low:.0f}-{100 * value.high:.0f})"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    return Table("", headings, list(rows)).markdown()


def main_table(points: Points, pairs: Sequence[tuple[str, float | None]]) -> str:
    """Make a row per method and budget: bytes, accuracies, perplexity and KL."""
    headings = (
        "cache", "meant to remove", "bytes per token", "of uncompressed", "lines, question in the prompt",
        "lines, context first", "needles, context first", "perplexity", "KL, nats",
    )  # fmt: skip
    return table(headings, (_main_row(points, method, budget) for method, budget in pairs))


def _main_row(points: Points, method: str, budget: float | None) -> list[str]:
    lines, text = points.find(method, budget, "lines", IN_PREFILL), points.find(method, budget, "continuation")
    cache = lines or text
    return [
        method,
        BUDGET_NAMES.get(budget, f"{100 * (1 - (budget or 0)):.3g} %"),
        "–" if cache is None or cache.bytes_per_token is None else f"{cache.bytes_per_token:,.0f}",
        "–" if cache is None or cache.ratio is None else f"{100 * cache.ratio:.1f} %",
        percent(points.score(method, budget)),
        percent(points.score(method, budget, CONTEXT_FIRST)),
        percent(points.score(method, budget, CONTEXT_FIRST, "niah-single")),
        "–" if text is None or text.perplexity is None else f"{text.perplexity.mean:.2f}",
        "–" if text is None or text.kl is None else f"{text.kl.mean:.3f}",
    ]


def verdict(better: Value | None, worse: Value | None) -> str:
    """Say whether the first is above the second, told apart by their intervals."""
    if better is None or worse is None or None in (better.low, worse.low):
        return "not measured"
    if better.low > worse.high:  # type: ignore[operator] (checked above)
        return "yes"
    if better.high < worse.low:  # type: ignore[operator]
        return "NO, the other way round"
    return "not told apart"


def orderings(points: Points) -> str:
    """Hold the paper's order at 80 % against ours, in both protocols."""
    rows = [
        [f"{better} above {worse}", f"{PAPER_80[better]} > {PAPER_80[worse]} %", *_compared(points, better, worse)]
        for better, worse in itertools.pairwise((TRAINED, "ASVD", "H2O-like", "StreamingLLM"))
    ]
    return table(("order at 80 %", "paper (LongChat-7B, 200 lines)", "question in the prompt", "context first"), rows)


def _compared(points: Points, better: str, worse: str) -> list[str]:
    cells = []
    for protocol in (IN_PREFILL, CONTEXT_FIRST):
        one, other = points.score(better, 0.2, protocol), points.score(worse, 0.2, protocol)
        cells.append(f"{verdict(one, other)}: {percent(one)}, {percent(other)}")
    return cells


def windows(points: Points) -> str:
    """Show accuracy over the exact window at 80 %."""
    rows = [
        [
            str(window),
            f"{PAPER_WINDOWS[window]} %" if window in PAPER_WINDOWS else "–",
            *(percent(points.score(f"{name}, window {window}", 0.2)) for name in (TRAINED, "ASVD")),
            *(points.perplexity(f"{name}, window {window}", 0.2) for name in (TRAINED, "ASVD")),
        ]
        for window in WINDOWS
    ]
    headings = (
        "exact window", "paper, lines", "CSKV, lines", "ASVD, lines", "CSKV, perplexity", "ASVD, perplexity",
    )  # fmt: skip
    return table(headings, rows)


def splits(points: Points) -> str:
    """Show accuracy over the split of a budget between keys and values, untrained."""
    rows = [
        [
            *(f"{100 * kept:g} %" for kept in (total, k, v)),
            percent(points.score(name, total)),
            points.perplexity(name, total),
        ]
        for (name, total), (k, v) in split_names().items()
    ]
    return table(("kept in all", "of the keys", "of the values", "lines", "perplexity"), rows)


def quantisation(points: Points) -> str:
    """Compare 4-bit latents that were trained through the grid with others."""
    names = ("4 bits, post-training", "4 bits, QAT")
    rows = [
        [
            *(f"{100 * (1 - density):g} %", "0 %", f"{paper} %"),
            *(percent(points.score(name, density / 4)) for name in names),
            *(points.perplexity(name, density / 4) for name in names),
        ]
        for density, paper in PAPER_QAT.items()
    ]
    headings = (
        "channels removed", "paper, post-training", "paper, QAT", "post-training, lines", "QAT, lines",
        "post-training, perplexity", "QAT, perplexity",
    )  # fmt: skip
    return table(headings, rows)

"""The README's table and figure and docs/evaluation.md, from the committed results of `make results`.

python benchmarks/results_report.py                    # from docs/results
python benchmarks/results_report.py outputs/results    # takes a run over: copies its files to docs/results first
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from common import ROOT
from pages import Table, fill_page
from results import PARTS
from results_methods import TRAINED, WINDOWS, split_names

from cskv.evaluation.decoding import CONTEXT_FIRST, IN_PREFILL
from cskv.evaluation.pooling import Pooled, Value, pool
from cskv.evaluation.results import Run, read_run
from cskv.plots import plot_accuracy, plot_needles, plot_perplexity

COMMITTED, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
README_BUDGETS: dict[str, Sequence[float | None]] = {
    "uncompressed": (None,),
    "QuantizedCache (hqq)": (0.25, 0.125),
    **dict.fromkeys(("StreamingLLM", "H2O-like", "SnapKV", "SVD", "ASVD", TRAINED), (0.2,)),
    "CSKV, PCA": (0.2, 0.1),
    "CSKV, mixed widths": (0.1, 0.05),
}
PAPER_80 = {"StreamingLLM": 6, "H2O-like": 18, "ASVD": 26, TRAINED: 92}
PAPER_WINDOWS = {2: 77, 8: 85, 32: 92, 128: 94, 1024: 95}
PAPER_QAT = {0.5: 96, 0.4: 94, 0.3: 92, 0.2: 90}
SHOWN_NEEDLES = ("uncompressed", "StreamingLLM", "H2O-like", "ASVD", TRAINED, "CSKV, PCA")


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
        "0 %" if budget is None else f"{100 * (1 - budget):.3g} %",
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


def read_all(folder: Path) -> dict[str, Run]:
    """Read the runs of a folder, by part."""
    return {part: read_run(folder / name) for part, name in PARTS.items() if (folder / name).exists()}


def main(source: Annotated[Path, typer.Argument(help="Folder of results to take over.")] = COMMITTED) -> None:
    """Write tables and figures."""
    COMMITTED.mkdir(parents=True, exist_ok=True)
    if source.resolve() != COMMITTED.resolve():
        for name in PARTS.values():
            if (source / name).exists():
                shutil.copyfile(source / name, COMMITTED / name)
    runs = read_all(COMMITTED)
    draw(_both_tables(runs))
    for page, text in texts(runs).items():
        fill_page(page, "results_report", text)


def texts(runs: dict[str, Run]) -> dict[Path, str]:
    """Return the text that each page holds of the results."""
    whole, where = _both_tables(runs), measured_on(runs)
    pairs = [(method, budget) for method, budgets in README_BUDGETS.items() for budget in budgets]
    short = f"{main_table(whole, pairs)}\n\n{where}"
    return {ROOT / "README.md": short, ROOT / "docs" / "evaluation.md": everything(whole, runs, where)}


def _both_tables(runs: dict[str, Run]) -> Points:
    """Pool two parts; the second environment's uncompressed cache is there to be compared, not shown."""
    tokens = [row for row in runs["tokens"].rows if row["method"] != "uncompressed"] if "tokens" in runs else []
    return Points(pool([*runs["channels"].rows, *tokens]))


def draw(points: Points) -> None:
    """Draw the figures of the README and of the page."""
    lines = [point for point in points.points if point.task == "lines"]
    plot_accuracy(lines, FIGURES / "evaluation-accuracy.png", "LongEval, 200 lines, over cache bytes")
    text = [point for point in points.points if point.task == "continuation"]
    plot_perplexity(text, FIGURES / "evaluation-perplexity.png", "Perplexity of a continuation over cache bytes")
    needles = [p for p in points.points if p.cells and p.protocol == "context-first" and p.budget in (None, 0.2)]
    needles = [point for point in needles if point.method in SHOWN_NEEDLES]
    plot_needles(needles, FIGURES / "evaluation-needles.png", "Needles found, context first, 80 % removed")


def everything(points: Points, runs: dict[str, Run], where: str) -> str:
    """Return everything of docs/evaluation.md that is measured."""
    pairs = points.methods(None, 0.25, 0.125, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    parts = ["### All methods", main_table(points, pairs), where, "### The paper's order", orderings(points)]
    if "ablations" in runs:
        ablations = Points(pool(runs["ablations"].rows))
        parts += ["### The exact window, 80 % removed", windows(ablations), _sample(runs["ablations"])]
        parts += ["### Keys against values, ASVD untrained", splits(ablations)]
        parts += ["### 4-bit latents: trained through the grid, or quantised afterwards", quantisation(ablations)]
    return "\n\n".join(parts)


def _sample(run: Run) -> str:
    """Describe the amount of material of the ablations."""
    seeds = sorted({row["seed"] for row in run.rows})
    questions = run.settings["cases"] * len(seeds)
    return (
        f"This and what follows: question in the prompt, {questions} questions per cell, perplexity of whole texts, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    )


def measured_on(runs: dict[str, Run]) -> str:
    """Describe on what and how the tables were measured."""
    run = runs["channels"]
    settings, machine = run.settings, run.environment
    cases = settings["cases"] * len(settings["seeds"])
    others = ""
    if "tokens" in runs:
        kvpress = next(facts["kvpress"] for facts in runs["tokens"].methods.values() if "kvpress" in facts)
        others = (
            f" Methods that drop tokens are kvpress {kvpress}'s, with transformers "
            f"{runs['tokens'].environment['transformers']}."
        )
    return (
        f"Bundled model, {run.model['dtype']}; {cases} questions per cell ({len(settings['seeds'])} seeds), 95 % "
        f"intervals; records of {settings['lines'][0]} lines; needles in {max(settings['tokens'])} tokens; perplexity "
        f"and KL of the last {settings['continued']} of {settings['text_tokens'][0]} tokens of "
        f"{settings['texts'] * len(settings['seeds'])} held-out texts. Bytes are those that the cache holds after the "
        f"prompt, window, positions and slack included. {machine['accelerator'] or machine['cpu']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, {machine['date'][:10]}.{others} "
        "Reproduce with `make results`."
    )


if __name__ == "__main__":
    typer.run(main)

"""The pages that are made of docs/results: what stands between their markers, and the figures.

A marker `<!-- measured: benchmarks/quality/report.py NAME -->` names one of `BLOCKS`. A model that a suite was not
measured on has no table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.pages import DOCS, Table, fill_page, machine
from benchmarks.quality.subjects import SUBJECTS
from benchmarks.quality.suites import OURS, PAPER, WINDOWS, splits
from benchmarks.quality.tables import COLUMNS, NOTHING, Points, Results, number, percent
from benchmarks.quality.workshop import BUDGETS
from cskv.evaluation.decoding import CONTEXT_FIRST, IN_PREFILL
from cskv.evaluation.pooling import Value
from cskv.evaluation.results import Run
from cskv.evaluation.settings import CONTINUATION, DEPARTURE, TEXT_TASKS
from cskv.methods.method import label
from cskv.plots import plot_divergence
from cskv.plots.series import method_looks

SCRIPT = "quality/report"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
SHOWN: dict[str, Sequence[float | None]] = {  # in the README
    "uncompressed": (None,),
    "fp8": (0.5,),
    "QuantizedCache (hqq)": (0.25, 0.125),
    "StreamingLLM": (0.2,),
    "H2O-like": (0.2,),
    "SnapKV": (0.2,),
    "ASVD": (0.2,),
    PAPER: (0.2,),
    OURS: BUDGETS,
}
TEXT = ("bytes", "KL", "perplexity", "same token")
WRITTEN = ("bytes", "tokens until it departs", "never departs", "KL along the text", "code")
READ = [name for name in COLUMNS if name not in WRITTEN[1:]]
MAIN = [name for name in READ if name not in ("KL", "perplexity")]  # what methods that drop tokens can do as well
PAPER_80 = {"StreamingLLM": 6, "H2O-like": 18, "ASVD": 26, PAPER: 92}  # lines, LongChat-7B, 200 lines
Block = Callable[[Results, str], list[Table]]


def write_pages(folder: Path) -> None:
    """Fill every page that has markers, and draw the figure."""
    results = Results(folder)
    for page in PAGES:
        for name, parts in blocks_of(page, results).items():
            fill_page(page, SCRIPT, *parts, block=name)
    draw(results)


def blocks_of(page: Path, results: Results) -> dict[str, list[str]]:
    """Return what belongs between a page's markers, by block."""
    text = page.read_text(encoding="utf-8")
    return {name: paragraphs(name, results) for name in BLOCKS if f"{SCRIPT}.py {name} -->" in text}


def paragraphs(name: str, results: Results) -> list[str]:
    """Return a block: for every model its tables, and on what they were measured."""
    suites, tables = BLOCKS[name]
    parts = []
    for subject in SUBJECTS.values():
        if results.run(subject.name, suites[0]) is not None:
            parts += [table.markdown() for table in tables(results, subject.name)]
            parts.append(measured_on(results, subject.name, suites))
    return parts


def measured_on(results: Results, subject: str, suites: Sequence[str]) -> str:
    """Describe texts, questions, machine and command of a model's first suite, and what ran elsewhere."""
    runs = [run for suite in suites if (run := results.run(subject, suite)) is not None]
    run, settings = runs[0], runs[0].settings
    seeds = sorted({row["seed"] for row in run.rows})
    parts = [f"{SUBJECTS[subject].title} in {run.model['dtype']}"]
    if any(task in TEXT_TASKS for task in settings["tasks"]):
        texts = f"{settings['texts'] * len(seeds)} texts of {settings['text_tokens'][0]} tokens of {settings['text']}"
        if CONTINUATION in settings["tasks"]:
            texts += f", continuation: the last {settings['continued']}"
        if DEPARTURE in settings["tasks"]:
            texts += f", and {settings['generated']} generated after each"
        parts.append(texts)
    parts += [f"calibrated on {settings['calibration']}", f"seed{'s'[: len(seeds) - 1]} {', '.join(map(str, seeds))}"]
    partly = [name for name, own in _seeds(run).items() if own != seeds]
    if partly:
        parts[-1] += f" (of {', '.join(partly)} fewer)"
    if any(row["protocol"] is not None for row in run.rows):
        parts.append(f"{settings['cases']} questions a cell and seed, 95 % intervals")
    said = "; ".join(parts)
    versions = (f"{name} {run.environment[name]}" for name in ("torch", "transformers"))
    said += f". {machine(run.environment, *versions)}."
    for other in runs[1:]:
        kvpress = next((facts["kvpress"] for facts in other.methods.values() if "kvpress" in facts), None)
        if kvpress is not None:
            said += f" Methods that drop tokens are kvpress {kvpress}'s, with transformers "
            said += f"{other.environment['transformers']}."
    return f"{said} `python -m benchmarks.quality {suites[0]} --model {subject}`."


def _seeds(run: Run) -> dict[str, list[int]]:
    """Return the seeds of every method."""
    found: dict[str, set[int]] = {}
    for row in run.rows:
        found.setdefault(label(row["method"], row["budget"]), set()).add(row["seed"])
    return {name: sorted(seeds) for name, seeds in found.items()}


def _main(results: Results, subject: str) -> list[Table]:
    points = results.points(subject, "caches", "tokens")
    wanted = [(method, budget) for method, budgets in SHOWN.items() for budget in budgets]
    pairs = [pair for pair in points.pairs() if pair in wanted]
    return [points.table(MAIN, sorted(pairs, key=wanted.index), SUBJECTS[subject].title)]


def _all(results: Results, subject: str) -> list[Table]:
    return [results.points(subject, "caches", "tokens").table(READ, title=SUBJECTS[subject].title)]


def _table(suite: str, columns: Sequence[str]) -> Block:
    return lambda results, subject: [results.points(subject, suite).table(columns, title=SUBJECTS[subject].title)]


def _texts(results: Results, subject: str) -> list[Table]:
    """Make one table of both texts that were read."""
    own, other = (results.points(subject, suite) for suite in ("texts", "texts-other"))
    cells = [
        [
            f"{method}, {100 * (budget or 1):.3g} %",
            *(COLUMNS["KL"](points, (method, budget)) for points in (own, other)),
        ]
        for method, budget in own.pairs()
    ]
    return [Table(SUBJECTS[subject].title, ("cache", "KL on prose", "KL on sources"), cells)]


def _orders(results: Results, subject: str) -> list[Table]:
    """Say which of the paper's orders hold, by intervals."""
    points, names, rows = results.points(subject, "caches", "tokens"), list(PAPER_80), []
    for worse, better in itertools.pairwise(names):
        for task in ("lines", "niah-single"):
            cells = [f"{better} above {worse}", f"{PAPER_80[better]} > {PAPER_80[worse]} %", task]
            for protocol in (IN_PREFILL, CONTEXT_FIRST):
                found = [points.find((name, 0.2), task, protocol) for name in (better, worse)]
                cells.append(verdict(*(None if point is None else point.score for point in found)))
            rows.append(cells)
    rows = [row for row in rows if row[3:] != ["not measured"] * 2]
    headings = ("order at 80 %", "paper, lines", "task", "question in the prompt", "context first")
    return [Table(SUBJECTS[subject].title, headings, rows)]


def verdict(better: Value | None, worse: Value | None) -> str:
    """Say whether the first is above the second, told apart by their intervals."""
    if better is None or worse is None or None in (better.low, worse.low):
        return "not measured"
    found = f"{percent(better)}, {percent(worse)}"
    if better.low > worse.high:  # type: ignore[operator]
        return f"yes: {found}"
    return f"NO, the other way round: {found}" if worse.low > better.high else f"not told apart: {found}"  # type: ignore[operator]


def _paper(results: Results, subject: str) -> list[Table]:
    """Make the paper's ablations: windows, splits, and 4 bits."""
    points = results.points(subject, "paper")
    names = {PAPER: 0.2, "ASVD": 0.2, OURS: 0.1}
    windows = [
        [str(window), *(_kl(points, f"{name}, window {window}", kept) for name, kept in names.items())]
        for window in WINDOWS
    ]
    shares = [
        [*(f"{100 * kept:g} %" for kept in (total, k, v)), _kl(points, name, total)]
        for (name, total), (k, v) in splits().items()
    ]
    bits = [
        [f"{100 * density:g} %", *(_kl(points, f"4 bits, {how}", density / 4) for how in ("post-training", "QAT"))]
        for density in (0.5, 0.2)
    ]
    titles = [f"{name}, {100 * kept:g} %" for name, kept in names.items()]
    return [
        Table(f"{SUBJECTS[subject].title}: KL over the exact window", ("window", *titles), windows),
        Table("KL over the split of ASVD's channels", ("kept in all", "of the keys", "of the values", "KL"), shares),
        Table("KL of 4-bit latents of the paper's factors", ("channels kept", "post-training", "QAT"), bits),
    ]


def _kl(points: Points, method: str, budget: float) -> str:
    point = points.find((method, budget), "agreement")
    return NOTHING if point is None else number(point.kl, 4)


# By name: the suites that it is of, the first being the one that says what was measured, and the tables of a model.
BLOCKS: Mapping[str, tuple[Sequence[str], Block]] = {
    "main": (("caches", "tokens"), _main),
    "all": (("caches", "tokens"), _all),
    "orders": (("caches", "tokens"), _orders),
    "factors": (("factors",), _table("factors", TEXT)),
    "generation": (("generation",), _table("generation", WRITTEN)),
    "blocks": (("blocks",), _table("blocks", TEXT)),
    "widths": (("widths",), _table("widths", TEXT)),
    "texts": (("texts", "texts-other"), _texts),
    "rebuild": (("rebuild",), _table("rebuild", TEXT)),
    "paper": (("paper",), _paper),
}


def draw(results: Results) -> None:
    """Draw KL over bytes of every model, on what all methods can do; a method looks the same in all figures."""
    found = {
        name: [point for point in results.points(name, "caches", "tokens").points if point.task == CONTINUATION]
        for name in SUBJECTS
    }
    looks = method_looks(point for points in found.values() for point in points)
    for name, points in found.items():
        if points:
            title = f"{SUBJECTS[name].title}: what caches lose"
            plot_divergence(points, DOCS / "figures" / f"quality-{name}.png", title, looks)

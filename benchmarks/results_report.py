"""The README's table and figure and docs/evaluation.md, from the committed results of `make results`.

python benchmarks/results_report.py                    # from docs/results
python benchmarks/results_report.py outputs/results    # takes a run over: copies its files to docs/results first
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from common import ROOT
from pages import fill_page
from results import PARTS
from results_methods import TRAINED
from results_tables import Points, main_table, orderings, quantisation, splits, windows

from cskv.evaluation.pooling import pool
from cskv.evaluation.results import Run, read_run
from cskv.plots import plot_accuracy, plot_needles, plot_perplexity

COMMITTED, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
README_ROWS: list[tuple[str, float | None]] = [
    ("uncompressed", None),
    ("QuantizedCache (hqq)", 0.25),
    ("QuantizedCache (hqq)", 0.125),
    ("StreamingLLM", 0.2),
    ("H2O-like", 0.2),
    ("SnapKV", 0.2),
    ("SVD", 0.2),
    ("ASVD", 0.2),
    (TRAINED, 0.2),
    ("CSKV, PCA", 0.2),
    ("CSKV, PCA", 0.1),
    ("CSKV, mixed widths", 0.1),
    ("CSKV, mixed widths", 0.05),
]
SHOWN_NEEDLES = ("uncompressed", "StreamingLLM", "H2O-like", "ASVD", TRAINED, "CSKV, PCA")


def read_all(folder: Path) -> dict[str, Run]:
    """The runs of a folder by part."""
    return {part: read_run(folder / name) for part, name in PARTS.items() if (folder / name).exists()}


def main(
    source: Annotated[Path, typer.Argument(help="Folder of results to take over.")] = COMMITTED,
) -> None:
    """Write tables and figures."""
    COMMITTED.mkdir(parents=True, exist_ok=True)
    if source.resolve() != COMMITTED.resolve():
        for name in PARTS.values():
            if (source / name).exists():
                shutil.copyfile(source / name, COMMITTED / name)
    runs = read_all(COMMITTED)
    draw(Points(pool(_once(runs))))
    for page, text in texts(runs).items():
        fill_page(page, "results_report", text)


def texts(runs: dict[str, Run]) -> dict[Path, str]:
    """Return the text that each page holds of the results."""
    whole, where = Points(pool(_once(runs))), measured_on(runs)
    short = f"{main_table(whole, README_ROWS)}\n\n{where}"
    return {ROOT / "README.md": short, ROOT / "docs" / "evaluation.md": everything(whole, runs, where)}


def _once(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """Rows of both tables' parts; the second environment's uncompressed cache is there to be compared, not shown."""
    tokens = [row for row in runs["tokens"].rows if row["method"] != "uncompressed"] if "tokens" in runs else []
    return [*runs["channels"].rows, *tokens]


def draw(points: Points) -> None:
    """The figures of the README and of the page."""
    lines = [point for point in points.points if point.task == "lines"]
    plot_accuracy(lines, FIGURES / "evaluation-accuracy.png", "LongEval, 200 lines, over cache bytes")
    text = [point for point in points.points if point.task == "continuation"]
    plot_perplexity(text, FIGURES / "evaluation-perplexity.png", "Perplexity of a continuation over cache bytes")
    needles = [
        p
        for p in points.points
        if p.cells and p.protocol == "context-first" and p.method in SHOWN_NEEDLES and p.budget in (None, 0.2)
    ]
    plot_needles(needles, FIGURES / "evaluation-needles.png", "Needles found, context first, 80 % removed")


def everything(points: Points, runs: dict[str, Run], where: str) -> str:
    """Everything of docs/evaluation.md that is measured."""
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

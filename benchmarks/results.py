"""Every cache method on the bundled model, at 50 to 95 % of the cache removed, two seeds: `make results`.

    python benchmarks/results.py channels      # uncompressed, quantised, SVD, ASVD, CSKV
    python benchmarks/results.py ablations     # window, split between keys and values, quantisation-aware training
    python benchmarks/results.py tokens        # StreamingLLM, H2O-like, SnapKV: in an environment with kvpress

Each part writes one file of outputs/results, in the format of `cskv evaluate`; what is there already is not measured
again, so that an interrupted part goes on. Adapters are kept beside them. `benchmarks/results_check.py` holds a run
against the committed one of docs/results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from bundled import NUM_LINES, SEEDS, load
from common import MODEL, ROOT
from results_methods import Workshop, ablation_methods, channel_methods, token_methods

from cskv.cli.common import progress
from cskv.evaluation.environment import environment
from cskv.evaluation.identity import model_facts
from cskv.evaluation.results import Run, open_run
from cskv.evaluation.runner import evaluate, lacks
from cskv.evaluation.settings import EvaluationSettings
from cskv.methods.method import label

OUT = ROOT / "outputs" / "results"
PARTS = {"channels": "evaluation.json", "tokens": "evaluation-tokens.json", "ablations": "evaluation-ablations.json"}
COMMON: dict[str, Any] = {
    "lines": (NUM_LINES,),
    "cases": 50,
    "seeds": SEEDS,
    "wording": "lines",  # the bundled model has learnt no other
    "max_new_tokens": 16,
    "texts": 8,
}
WHOLE = EvaluationSettings(tasks=("lines", "niah-single", "perplexity", "continuation"), tokens=(500, 1000), **COMMON)
FEW = EvaluationSettings(tasks=("lines", "perplexity"), protocols=("in-prefill",), **COMMON)
SETTINGS = {"channels": WHOLE, "tokens": WHOLE, "ablations": FEW}
METHODS = {"channels": channel_methods, "tokens": token_methods, "ablations": ablation_methods}


def measure(part: str, folder: Path, adapters: Path, seeds: Sequence[int] = SEEDS, only: str = "") -> Run:
    """Measure what a part lacks of some of its seeds and methods."""
    model, settings = load(), SETTINGS[part]
    facts = model_facts(model) | {"name": str(MODEL.relative_to(ROOT))}
    run = open_run(folder / PARTS[part], settings.to_dict(), facts, environment().to_dict())
    for seed in seeds:
        own = dataclasses.replace(settings, seeds=(seed,))
        workshop = Workshop(model, adapters / str(seed), seed)
        for (name, budget), make in METHODS[part](workshop).items():
            streams = part != "tokens" or budget is None
            lacking = sum(lacks(run, job, name, budget, streams=streams) for job in own.jobs())
            if lacking and only in label(name, budget):
                with progress() as bar:
                    task = bar.add_task(f"seed {seed}: {label(name, budget)}", total=lacking)
                    advance = lambda _what, share, bar=bar, task=task: bar.advance(task, share)  # noqa: E731 (short)
                    kept = {"keep_outputs": False, "variant": f" (seed {seed})"}
                    evaluate(model, workshop.tokenizer, [make()], own, run, **kept, on_work=advance)
    return run


def main(
    part: Annotated[str, typer.Argument(help=f"One of {', '.join(PARTS)}.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the result files.")] = OUT,
    adapters: Annotated[Path, typer.Option("--adapters", help="Folder of adapters.")] = OUT / "adapters",
    seed: Annotated[list[int], typer.Option("--seed", help="One of the seeds; again for more.")] = [*SEEDS],  # noqa: B006
    only: Annotated[str, typer.Option("--only", help="Only methods whose name has this, like 'ASVD 20 %'.")] = "",
) -> None:
    """Measure one part."""
    if part not in PARTS:
        raise typer.BadParameter(f"part is {part!r}; expected one of {', '.join(PARTS)}")
    measure(part, out, adapters, seed, only)


if __name__ == "__main__":
    typer.run(main)

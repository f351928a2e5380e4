"""The one way in which quality is measured.

    python scripts/fetch_model.py smollm2 models/smollm2
    python -m benchmarks.quality caches --model smollm2     # measures what docs/results lacks, row by row
    python -m benchmarks.quality check outputs/results      # holds a rerun (--out outputs/results) against docs/results
    python -m benchmarks.quality report                     # tables and figures of docs/results, into the pages
    python -m benchmarks.quality heavy-tokens --text offline    # tokens unlike all others; prints a table

Results are runs in the format of `cskv evaluate`, a file for a model and a suite, written after every row: an
interrupted suite goes on with the same command. Statistics and adapters are kept in outputs/quality.
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.quality.subjects import SUBJECTS, Subject, Texts
from benchmarks.quality.suites import SUITES, Suite
from benchmarks.quality.workshop import OWN, Workshop
from cskv.cli.stages import Stages
from cskv.errors import CSKVError
from cskv.evaluation.environment import environment
from cskv.evaluation.identity import model_facts
from cskv.evaluation.results import Run, open_run
from cskv.evaluation.runner import evaluate, lacks
from cskv.methods.method import label

RESULTS, ADAPTERS = ROOT / "docs" / "results", ROOT / "outputs" / "quality"
SEEDS = (0, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a suite, check a rerun, or write the pages. The exit code is returned."""
    width = max(map(len, SUITES))
    listed = "\n".join(f"  {name:{width}}  {suite.about}" for name, suite in SUITES.items())
    parser = ArgumentParser(
        prog="python -m benchmarks.quality",
        description=f"{__doc__}\nsuites:\n{listed}\n",
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUITE, check, report or heavy-tokens")
    for name, suite in SUITES.items():
        _add_options(commands.add_parser(name, help=suite.about))
    check = commands.add_parser("check", help="hold a rerun against the committed results")
    check.add_argument("folder", type=Path, help="of the rerun's files")
    commands.add_parser("report", help="write the pages")
    heavy = commands.add_parser("heavy-tokens", help="look for tokens whose keys or values are unlike all others")
    _add_model(heavy)
    heavy.add_argument("--text", action="append", required=True, help="name or file; several are compared")
    asked = parser.parse_args((sys.argv[1:] if arguments is None else list(arguments)) or ["--help"])
    try:
        if asked.command == "check":
            from benchmarks.quality.check import check_folder

            return check_folder(asked.folder, RESULTS)
        if asked.command == "report":
            from benchmarks.quality.report import write_pages

            write_pages(RESULTS)
            return 0
        if asked.command == "heavy-tokens":
            from benchmarks.quality.heavy_tokens import heavy_tokens

            heavy_tokens(*load(SUBJECTS[asked.model]), asked.text).print()
            return 0
        measure(asked.command, asked)
    except CSKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def measure(name: str, asked: Namespace) -> Run:
    """Measure what the run of a suite lacks, seed by seed and method by method."""
    suite, subject = SUITES[name], SUBJECTS[asked.model]
    texts = Texts(asked.calibration, asked.heldout, asked.other)
    model, tokenizer = load(subject)
    run = open_run(
        asked.out / f"{subject.name}-{name}.json",
        _described(suite, subject, texts),
        model_facts(model) | {"name": subject.title},
        environment().to_dict(),
    )
    settings = subject.evaluation(_heldout(suite, texts), tuple(asked.seed), suite.kind)
    made = hashlib.sha256(json.dumps(texts.describe(), sort_keys=True).encode()).hexdigest()[:8]
    todo = []
    for seed in asked.seed:
        own = replace(settings, seeds=(seed,))
        folder = ADAPTERS / subject.name / made / str(seed)
        workshop = Workshop(model, tokenizer, folder, seed, texts, subject.training)
        for (method, budget), make in suite.methods(workshop).items():
            streams = not suite.presses or budget is None
            lacking = [job for job in own.jobs() if lacks(run, job, method, budget, streams=streams)]
            name = label(method, budget)
            if lacking and asked.only in name and not (asked.skip and asked.skip in name):
                todo.append((f"seed {seed}: {name}", make, own, lacking))
    with Stages([sum(map(settings.tokens_of, lacking)) for *_, lacking in todo]) as stages:
        for name, make, own, lacking in todo:
            stages(name, 0.0)  # which begins with making an adapter

            def on_work(_what: str, share: float, name: str = name, jobs: int = len(lacking)) -> None:
                stages(name, share / jobs)

            variant = f" (seed {own.seeds[0]})"
            evaluate(model, tokenizer, [make()], own, run, keep_outputs=False, variant=variant, on_work=on_work)
    return run


def load(subject: Subject) -> tuple[Any, Any]:
    """Return a subject's model and tokenizer.

    Raises:
        CSKVError: its folder holds none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (subject.folder / "config.json").exists():
        fetched = f"python scripts/fetch_model.py {subject.name} {subject.folder.relative_to(ROOT)}"
        raise CSKVError(f"there is no model in {subject.folder}; get it with {fetched}")
    model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(subject.folder)


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("--model", choices=SUBJECTS, default="smollm2", help="whose folder is models/NAME")


def _add_options(parser: ArgumentParser) -> None:
    defaults = Texts()
    _add_model(parser)
    parser.add_argument("--calibration", default=defaults.calibration, help="text to make adapters from: name or file")
    parser.add_argument("--heldout", default=defaults.heldout, help="text to measure on")
    parser.add_argument("--other", default=defaults.other, help="text of another kind")
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", help="only methods whose name has this, like 'CSKV 20 %%'")
    parser.add_argument("--skip", default="", help="leave out methods whose name has this, like 'distilled'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")


def _heldout(suite: Suite, texts: Texts) -> str:
    return texts.heldout if suite.heldout == OWN else texts.other


def _described(suite: Suite, subject: Subject, texts: Texts) -> dict[str, object]:
    """Return everything that decides the figures, texts without their folders."""
    settings = subject.evaluation("", SEEDS, suite.kind).to_dict()
    described = texts.describe()
    return settings | {
        "text": described["heldout" if suite.heldout == OWN else "other"],
        "calibration": described["calibration"],
        "other": described["other"],
        "training": subject.training,
    }

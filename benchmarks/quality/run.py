"""The one way in which quality is measured.

    python scripts/fetch_model.py smollm2 models/smollm2
    python -m benchmarks.quality caches --model smollm2     # measures what docs/results lacks, row by row
    python -m benchmarks.quality check outputs/results      # holds a rerun (--out outputs/results) against docs/results
    python -m benchmarks.quality report                     # tables and figures of docs/results, into the pages

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

from benchmarks.common import ROOT
from benchmarks.quality.subjects import SUBJECTS, Subject, Texts
from benchmarks.quality.suites import SUITES, Suite
from benchmarks.quality.workshop import OWN, Workshop
from cskv.cli.common import progress
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUITE, check or report")
    for name, suite in SUITES.items():
        _add_options(commands.add_parser(name, help=suite.about))
    check = commands.add_parser("check", help="hold a rerun against the committed results")
    check.add_argument("folder", type=Path, help="of the rerun's files")
    commands.add_parser("report", help="write the pages")
    asked = parser.parse_args((sys.argv[1:] if arguments is None else list(arguments)) or ["--help"])
    try:
        if asked.command == "check":
            from benchmarks.quality.check import check_folder

            return check_folder(asked.folder, RESULTS)
        if asked.command == "report":
            from benchmarks.quality.report import write_pages

            write_pages(RESULTS)
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    suite, subject = SUITES[name], SUBJECTS[asked.model]
    texts = Texts(asked.calibration, asked.heldout, asked.other)
    if not (subject.folder / "config.json").exists():
        fetched = f"python scripts/fetch_model.py {subject.name} {subject.folder.relative_to(ROOT)}"
        raise CSKVError(f"there is no model in {subject.folder}; get it with {fetched}")
    model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    run = open_run(
        asked.out / f"{subject.name}-{name}.json",
        _described(suite, subject, texts),
        model_facts(model) | {"name": subject.title},
        environment().to_dict(),
    )
    settings = subject.evaluation(_heldout(suite, texts), tuple(asked.seed), questions=suite.questions)
    made = hashlib.sha256(json.dumps(texts.describe(), sort_keys=True).encode()).hexdigest()[:8]
    for seed in asked.seed:
        own = replace(settings, seeds=(seed,))
        folder = ADAPTERS / subject.name / made / str(seed)
        workshop = Workshop(model, tokenizer, folder, seed, texts, subject.training)
        for (method, budget), make in suite.methods(workshop).items():
            streams = not suite.presses or budget is None
            lacking = sum(lacks(run, job, method, budget, streams=streams) for job in own.jobs())
            if lacking and asked.only in label(method, budget):
                with progress() as bar:
                    task = bar.add_task(f"seed {seed}: {label(method, budget)}", total=lacking)
                    evaluate(
                        model,
                        tokenizer,
                        [make()],
                        own,
                        run,
                        keep_outputs=False,
                        variant=f" (seed {seed})",
                        on_work=lambda _what, share, bar=bar, task=task: bar.advance(task, share),
                    )
    return run


def _add_options(parser: ArgumentParser) -> None:
    defaults = Texts()
    parser.add_argument("--model", choices=SUBJECTS, default="smollm2", help="whose folder is models/NAME")
    parser.add_argument("--calibration", default=defaults.calibration, help="text to make adapters from: name or file")
    parser.add_argument("--heldout", default=defaults.heldout, help="text to measure on")
    parser.add_argument("--other", default=defaults.other, help="text of another kind")
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", help="only methods whose name has this, like 'CSKV 20 %%'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")


def _heldout(suite: Suite, texts: Texts) -> str:
    return texts.heldout if suite.heldout == OWN else texts.other


def _described(suite: Suite, subject: Subject, texts: Texts) -> dict[str, object]:
    """Return everything that decides the figures, texts without their folders."""
    settings = subject.evaluation("", SEEDS, questions=suite.questions).to_dict()
    described = texts.describe()
    return settings | {
        "text": described["heldout" if suite.heldout == OWN else "other"],
        "calibration": described["calibration"],
        "other": described["other"],
        "training": subject.training,
    }

"""`cskv evaluate`: what a compressed cache costs, beside the alternatives, on standard tasks or one's own text."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cskv.cli import options as opt
from cskv.cli.common import Interrupted, command, console, emit, say, set_logging
from cskv.cli.contestants import Contestants
from cskv.cli.groups import LoadingOptions
from cskv.cli.outputs import check_writable
from cskv.cli.settings import MOST_LINES, model_name, numbers, words
from cskv.cli.stages import Stages
from cskv.cli.tables import results_tables

if TYPE_CHECKING:
    from cskv.evaluation.results import Run
    from cskv.evaluation.settings import EvaluationSettings

DEFAULT_ROOT = Path("outputs/evaluation")

question_option, text_option = opt.panel("Questions"), opt.panel("Text")


@command
def evaluate(
    contestants: Contestants,
    loading: LoadingOptions,
    task: Annotated[
        list[str],
        question_option(
            "--task",
            "-t",
            help="lines (LongEval), passkey, niah-single, niah-multikey, niah-multivalue, niah-multiquery, vt, cwe, "
            "fwe (RULER), perplexity (with agreement), continuation, departure (how long "
            "generated text stays the uncompressed one's), code (functions of Python's library: RUNS WHAT THE MODEL "
            "WRITES, confined as far as this platform can). Several with commas, or again.",
        ),
    ] = ["lines", "perplexity"],  # noqa: B006 (typer copies it)
    lines: Annotated[list[str], question_option(help="Lines of LongEval records.")] = ["200"],  # noqa: B006
    lines_file: Annotated[
        list[Path] | None,
        question_option(help="A published LongEval lines file, instead of generated records; again for more."),
    ] = None,
    tokens: Annotated[list[str], question_option(help="Tokens of prompts of all tasks but lines.")] = ["1024"],  # noqa: B006
    depths: Annotated[list[str], question_option(help="Where needles lie, from 0 to 1.")] = ["0,0.25,0.5,0.75,1"],  # noqa: B006
    cases: Annotated[int, question_option(help="Questions per task, size and seed.")] = 50,
    protocol: Annotated[
        list[str],
        question_option(
            help="in-prefill: the question is prefilled with its context (the paper's). context-first: the context is "
            "compressed before the question is known (harder)."
        ),
    ] = ["in-prefill,context-first"],  # noqa: B006
    wording: Annotated[str, question_option(help="Of needles: ruler, or lines (LongEval's).")] = "ruler",
    haystack: Annotated[
        str, question_option(help="What needles are hidden in: noise, needles, or a text source.")
    ] = "offline",
    chat: Annotated[bool, question_option("--chat", help="Ask in the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[
        int | None,
        question_option(
            "--max-new-tokens", "-n", help="The longest answer. [default: 64; vt 30, cwe 120, fwe 50, code 320]"
        ),
    ] = None,
    text: Annotated[str, text_option(help="A text file, or offline, wikitext2, c4: held-out part.")] = "offline",
    texts: Annotated[int, text_option(help="Texts per seed.")] = 8,
    text_tokens: Annotated[list[str], text_option(help="Tokens of a text.")] = ["1024"],  # noqa: B006
    continued: Annotated[int, text_option(help="The last tokens, which continuation scores.")] = 256,
    generated: Annotated[int, text_option(help="Tokens that departure generates after a text.")] = 512,
    output: Annotated[
        Path | None,
        opt.files(
            "--output",
            "-o",
            help="Result file. An unfinished run of the same settings goes on; another one is never overwritten. "
            "[default: outputs/evaluation/MODEL/HASH.json]",
        ),
    ] = None,
    outputs: Annotated[bool, opt.files(help="Keep every answer in the file.")] = True,
    batch_size: Annotated[int, opt.running(help="Questions or texts read together.")] = 4,
    seed: Annotated[list[str], opt.running(help="Seeds of questions and texts.")] = ["0"],  # noqa: B006
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Measure accuracy, perplexity, agreement and allocated bytes of adapters and baselines, side by side.

    Every figure is of the cache as it really is: old tokens compressed, sinks and window exact, bytes those of the
    tensors that are held. `--window`, `--group` and `--sinks` are those of untrained baselines; adapters have their
    own. `cskv report` makes a page of the result files.

    Examples:

    * `cskv evaluate --adapter outputs/adapters/my-model/A --baseline svd@0.2`
    * `cskv evaluate -a PCA=A50 -a PCA=A20 -b asvd@0.5 -b asvd@0.2 -b quantized@4 --seed 0,1 -o results/my-model.json`
    * `cskv evaluate -a A -t niah-single,niah-multikey --tokens 4096,8192,16384 --text book.txt --haystack book.txt`
    * `cskv evaluate -a A -b quantized@4 -t vt,cwe,fwe,departure --tokens 4096 --text wikitext2 --generated 512`
    * `cskv evaluate -m lmsys/longchat-7b-v1.5-32k -a A -t lines --lines-file 200_lines.jsonl`
    """
    set_logging(logging_level)
    from cskv.data.code import CODE
    from cskv.evaluation.sandbox import run_confined
    from cskv.evaluation.settings import EvaluationSettings

    settings = EvaluationSettings(
        tasks=words(task),
        lines=_sizes_of(lines_file) or numbers("--lines", lines, int, MOST_LINES + 1),
        lines_files=tuple(map(str, lines_file or ())),
        tokens=numbers("--tokens", tokens, int),
        depths=numbers("--depths", depths, float),
        cases=cases,
        protocols=words(protocol),
        seeds=numbers("--seed", seed, int),
        wording=wording,
        haystack=haystack,
        chat=chat,
        text=text,
        texts=texts,
        text_tokens=numbers("--text-tokens", text_tokens, int),
        continued=continued,
        generated=generated,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    if CODE in settings.tasks:
        run_confined("pass")  # refused at once where this platform cannot
        say("code: what the model writes is run, confined; see docs/evaluation.md for what that holds and what not")
    contestants = replace(contestants, model_path=loading.optional_name(contestants.model_path))
    run = _measure(contestants, settings, loading, output, outputs)
    console().print(*results_tables(run, console()), sep="\n")
    say(f"results: {run.path}; `cskv report {run.path}` makes a page of them")
    emit({"command": "evaluate", "results": str(run.path), "rows": len(run.rows), "methods": sorted(run.methods)})


def _measure(
    contestants: Contestants,
    settings: EvaluationSettings,
    loading: LoadingOptions,
    output: Path | None,
    keep_outputs: bool,
) -> Run:
    """Load, measure what the result file lacks, and return its run."""
    from cskv.cli.loading import load_tokenizer
    from cskv.evaluation.environment import environment
    from cskv.evaluation.identity import model_facts
    from cskv.evaluation.results import open_run
    from cskv.evaluation.runner import evaluate as run_all
    from cskv.evaluation.runner import todo

    base = contestants.base()
    check_writable(output or DEFAULT_ROOT / model_name(base, contestants.model_id) / "results.json")
    tokenizer = load_tokenizer(base)
    model = loading.model(base)
    methods = contestants.methods(model, base)
    facts, where = model_facts(model), environment().to_dict()
    names = [method.label for method in methods]
    candidates = [output] if output else _default_outputs(base, contestants.model_id, settings, names)
    for target in candidates:
        run = open_run(target, settings.to_dict(), facts, where)
        left = todo(run, methods, settings)
        if left:
            break
    if run.rows:
        say(f"going on with {run.path}: {len(run.rows)} rows are there, {len(left)} measurements to go")
    with Stages([settings.tokens_of(job) for _, job in left]) as stages:
        try:
            run_all(model, tokenizer, methods, settings, run, keep_outputs=keep_outputs, on_work=stages)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted: {len(run.rows)} rows are in {run.path}; the same command goes on"
            ) from error
    return run


def _sizes_of(files: list[Path] | None) -> tuple[int, ...]:
    """Return the numbers of lines that published files ask about."""
    from cskv.data.lines import read_official

    return tuple(sorted({read_official(path)[0].num_lines for path in files or ()}))


def _default_outputs(
    base: str, model_id: str | None, settings: EvaluationSettings, methods: list[str]
) -> Iterator[Path]:
    """Yield files for these settings and methods: a complete one is kept, and the next is tried."""
    described = json.dumps([settings.to_dict(), methods], sort_keys=True)
    name = hashlib.sha256(described.encode()).hexdigest()[:8]
    folder = DEFAULT_ROOT / model_name(base, model_id)
    yield folder / f"{name}.json"
    yield from (folder / f"{name}-{number}.json" for number in itertools.count(2))

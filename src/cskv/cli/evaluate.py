"""`cskv evaluate`: what a compressed cache costs, beside the alternatives, on standard tasks or one's own text."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cskv.cli import options as opt
from cskv.cli.common import Interrupted, command, console, emit, progress, say, set_logging
from cskv.cli.contestants import Contestants
from cskv.cli.groups import LoadingOptions
from cskv.cli.lists import MOST_LINES, numbers, words
from cskv.cli.outputs import check_writable
from cskv.cli.settings import model_name

if TYPE_CHECKING:
    from cskv.evaluation.results import Run
    from cskv.evaluation.settings import EvaluationSettings

QUESTIONS, TEXT = "Questions", "Text"
DEFAULT_ROOT = Path("outputs/evaluation")

Tasks = Annotated[
    list[str],
    typer.Option(
        "--task", "-t",
        help="lines (LongEval), passkey, niah-single, niah-multikey, niah-multivalue, niah-multiquery (RULER), "
        "perplexity (with agreement), continuation. Several with commas, or again.",
        rich_help_panel=QUESTIONS,
    ),
]  # fmt: skip
Lines = Annotated[list[str], typer.Option("--lines", help="Lines of LongEval records.", rich_help_panel=QUESTIONS)]
LinesFiles = Annotated[
    list[Path] | None,
    typer.Option("--lines-file", help="A published LongEval lines file, instead of generated records; again for more.",
                 show_default=False, rich_help_panel=QUESTIONS),
]  # fmt: skip
Tokens = Annotated[list[str], typer.Option("--tokens", help="Tokens of needle prompts.", rich_help_panel=QUESTIONS)]
Depths = Annotated[
    list[str], typer.Option("--depths", help="Where needles lie, from 0 to 1.", rich_help_panel=QUESTIONS)
]
Cases = Annotated[int, typer.Option("--cases", help="Questions per task, size and seed.", rich_help_panel=QUESTIONS)]
Protocols = Annotated[
    list[str],
    typer.Option(
        "--protocol",
        help="in-prefill: the question is prefilled with its context (the paper's). context-first: the context is "
        "compressed before the question is known (harder).",
        rich_help_panel=QUESTIONS,
    ),
]
Wording = Annotated[
    str, typer.Option("--wording", help="Of needles: ruler, or lines (LongEval's).", rich_help_panel=QUESTIONS)
]
Haystack = Annotated[
    str,
    typer.Option(
        "--haystack", help="What needles are hidden in: noise, needles, or a text source.", rich_help_panel=QUESTIONS
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Ask in the tokenizer's chat template.", rich_help_panel=QUESTIONS)]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="The longest answer.", rich_help_panel=QUESTIONS)
]
Source = Annotated[
    str, typer.Option("--text", help="A text file, or offline, wikitext2, c4: held-out part.", rich_help_panel=TEXT)
]
Texts = Annotated[int, typer.Option("--texts", help="Texts per seed.", rich_help_panel=TEXT)]
TextTokens = Annotated[list[str], typer.Option("--text-tokens", help="Tokens of a text.", rich_help_panel=TEXT)]
Continued = Annotated[
    int, typer.Option("--continued", help="The last tokens, which continuation scores.", rich_help_panel=TEXT)
]
Seeds = Annotated[list[str], typer.Option("--seed", help="Seeds of questions and texts.", rich_help_panel=opt.RUNNING)]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Questions or texts read together.", rich_help_panel=opt.RUNNING)
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o",
        help="Result file. An unfinished run of the same settings goes on; another one is never overwritten. "
        "[default: outputs/evaluation/MODEL/HASH.json]",
        show_default=False, rich_help_panel=opt.FILES,
    ),
]  # fmt: skip
Outputs = Annotated[
    bool, typer.Option("--outputs/--no-outputs", help="Keep every answer in the file.", rich_help_panel=opt.FILES)
]


@command
def evaluate(
    contestants: Contestants,
    loading: LoadingOptions,
    task: Tasks = ["lines", "perplexity"],  # noqa: B006 (typer copies it)
    lines: Lines = ["200"],  # noqa: B006
    lines_file: LinesFiles = None,
    tokens: Tokens = ["1024"],  # noqa: B006
    depths: Depths = ["0,0.25,0.5,0.75,1"],  # noqa: B006
    cases: Cases = 50,
    protocol: Protocols = ["in-prefill,context-first"],  # noqa: B006
    wording: Wording = "ruler",
    haystack: Haystack = "offline",
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 64,
    text: Source = "offline",
    texts: Texts = 8,
    text_tokens: TextTokens = ["1024"],  # noqa: B006
    continued: Continued = 256,
    output: Output = None,
    outputs: Outputs = True,
    batch_size: BatchSize = 4,
    seed: Seeds = ["0"],  # noqa: B006
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Measure accuracy, perplexity, agreement and allocated bytes of adapters and baselines, side by side.

    Every figure is of the cache as it really is: old tokens compressed, the window exact, bytes those of the tensors
    that are held. `--window` and `--group` are those of untrained baselines; adapters have their own. `cskv report`
    makes a page of the result files.

    Examples:

    * `cskv evaluate --adapter outputs/adapters/my-model/A --baseline svd@0.2`
    * `cskv evaluate -a PCA=A50 -a PCA=A20 -b asvd@0.5 -b asvd@0.2 -b quantized@4 --seed 0,1 -o results/my-model.json`
    * `cskv evaluate -a A -t niah-single,niah-multikey --tokens 4096,8192,16384 --text book.txt --haystack book.txt`
    * `cskv evaluate -m lmsys/longchat-7b-v1.5-32k -a A -t lines --lines-file 200_lines.jsonl`
    """
    set_logging(logging_level)
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
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    run = _measure(contestants, settings, loading, output, outputs)
    _tell(run)
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
    with progress() as bar:
        line = bar.add_task("", total=len(left))
        try:
            run_all(
                model,
                tokenizer,
                methods,
                settings,
                run,
                keep_outputs=keep_outputs,
                on_work=lambda what, share: bar.update(line, description=what, advance=share),
            )
            bar.update(line, completed=len(left))  # sums of shares may fall short by a rounding
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted: {len(run.rows)} rows are in {run.path}; the same command goes on"
            ) from error
    return run


def _sizes_of(files: list[Path] | None) -> tuple[int, ...]:
    """The numbers of lines that published files ask about."""
    from cskv.data.lines import read_official

    return tuple(sorted({read_official(path)[0].num_lines for path in files or ()}))


def _default_outputs(
    base: str, model_id: str | None, settings: EvaluationSettings, methods: list[str]
) -> Iterator[Path]:
    """Files of these settings and methods: a complete one is kept, and the next is tried."""
    described = json.dumps([settings.to_dict(), methods], sort_keys=True)
    name = hashlib.sha256(described.encode()).hexdigest()[:8]
    folder = DEFAULT_ROOT / model_name(base, model_id)
    yield folder / f"{name}.json"
    yield from (folder / f"{name}-{number}.json" for number in itertools.count(2))


def _tell(run: Run) -> None:
    """The table, and where the results are."""
    from cskv.cli.tables import results_table

    console().print(results_table(run))
    say(f"results: {run.path}; `cskv report {run.path}` makes a page of them")

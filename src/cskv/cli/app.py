"""The `cskv` application: its subcommands and how option names are read."""

from __future__ import annotations

from typing import Annotated

import typer

import cskv
from cskv.cli.analyze import analyze
from cskv.cli.calibrate import calibrate
from cskv.cli.common import Commands
from cskv.cli.doctor import doctor
from cskv.cli.evaluate import evaluate
from cskv.cli.export import export
from cskv.cli.generate import generate
from cskv.cli.inspect import inspect
from cskv.cli.lm_eval import PASS_ON, lm_eval
from cskv.cli.report import report
from cskv.cli.train import train


def dashes(token: str) -> str:
    """Return an option's name with dashes; the paper's scripts spell them with underscores."""
    return token.replace("_", "-")


app = typer.Typer(
    name="cskv",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    context_settings={"token_normalize_func": dashes, "help_option_names": ["-h", "--help"]},
)
for command in (calibrate, train, generate, evaluate, report, analyze, inspect, export, doctor):
    app.command()(command)
app.command("lm-eval", context_settings=PASS_ON)(lm_eval)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cskv {cskv.__version__}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make the KV cache of a language model 5 to 20 times smaller along the channel dimension (CSKV).

    The usual order: **calibrate**, **train**, **inspect**, **generate**; **export** for vLLM. Options may be spelled
    with dashes or with underscores. Every command ends with one line of JSON on standard output; progress, notes and
    errors go to standard error. Exit codes: 0, 2 for a mistake in what was given, 130 when interrupted.
    """

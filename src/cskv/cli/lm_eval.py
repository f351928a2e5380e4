"""`cskv lm-eval`: lm-evaluation-harness's own command line, with the model `cskv` known to it."""

from __future__ import annotations

from typing import Any

import typer

from cskv.cli.common import command

# Everything is the harness's, `--help` and the order of what is given too.
PASS_ON: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


@command
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness (`lm-eval`) with the model `cskv`. All options are its own; `--help` shows them.

    Examples:

    * `cskv lm-eval run --model cskv --model_args adapter=ADAPTER --tasks hellaswag`
    * `cskv lm-eval run --model cskv --model_args adapter=none,pretrained=MODEL --tasks hellaswag`
    """
    from cskv.harness import run

    run(context.args)

"""What all commands share: how errors, progress and results reach the person and the machine that called."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cskv.errors import CSKVError

P = ParamSpec("P")

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """Raised on Ctrl-C by a command that can say what is kept and how to go on."""


def console() -> Console:
    """Standard error, looked up anew because test runners replace it."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line for the person, on standard error. Only the main process speaks."""
    if is_main_process():
        console().print(escape(text), soft_wrap=True)


def emit(result: dict[str, Any]) -> None:
    """The last line, for machines: one JSON object on standard output. Only the main process prints."""
    if is_main_process():
        sys.stdout.write(json.dumps(result, sort_keys=True, allow_nan=False) + "\n")
        sys.stdout.flush()


def is_main_process() -> bool:
    """False on the other processes that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn a user's mistake into one red line and exit code 2, and Ctrl-C into one line and exit code 130."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except BrokenPipeError:
            # The reader of our output went away (`cskv ... | head`). Without this, Python complains again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (CSKVError, OSError) as error:
            fail(str(error), EXIT_MISTAKE)
        except (Interrupted, KeyboardInterrupt) as error:
            fail(str(error) or "interrupted", EXIT_INTERRUPTED)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; named, because torch may not be imported yet
                raise
            fail(
                f"out of GPU memory: take shorter or fewer samples at a time, or --device-map auto ({error})",
                EXIT_MISTAKE,
            )

    return guarded


def fail(message: str, code: int) -> None:
    """Print a message as one red line on standard error and leave with an exit code."""
    line = " ".join(message.split())
    console().print(f"[bold red]error:[/bold red] [red]{escape(line)}[/red]", soft_wrap=True)
    raise typer.Exit(code)


def progress(*columns: str) -> Progress:
    """A progress bar on standard error with time spent and time left; `columns` are further task fields, as markup."""
    extra = [TextColumn(column) for column in columns]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *extra,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        disable=not is_main_process(),
    )


def set_logging(level: str) -> None:
    """Set the level of our and transformers' loggers, by name; transformers draws bars only where a person sees them.

    Raises:
        CSKVError: there is no such level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise CSKVError(f"logging level is {level!r}; expected DEBUG, INFO, WARNING, ERROR or CRITICAL")
    logging.basicConfig(level=number, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cskv").setLevel(number)
    logging.getLogger("transformers").setLevel(number)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

"""What all commands share: how errors, progress and results reach the person and the machine that called."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from cskv.cli.groups import expand
from cskv.errors import CSKVError

# What typer raises for a mistake in an option. Its own copy of click has no public name for it.
OptionMistake: Any = typer.BadParameter.__mro__[2]

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """Raised on Ctrl-C by a command that can say what is kept and how to go on."""


def console() -> Console:
    """Return standard error, looked up anew because test runners replace it."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line for the person on standard error. Only the main process speaks."""
    if is_main_process():
        console().print(escape(text), soft_wrap=True)


def emit(result: dict[str, Any]) -> None:
    """Print the last line, for machines: one JSON object on standard output. Only the main process prints.

    JSON has no NaN and no infinity; such figures, which an adapter may record, are null.
    """
    if is_main_process():
        sys.stdout.write(json.dumps(_finite(result), sort_keys=True, allow_nan=False) + "\n")
        sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_main_process() -> bool:
    """Return False on the other processes that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: options for all its parameters, and one line for every mistake."""
    return guarded(expand(function))


class Commands(TyperGroup):
    """The commands of `cskv`. A mistake in an option is one line, too, and so is Ctrl-C between options and command."""

    def invoke(self, ctx: Any) -> Any:
        return guarded(super().invoke)(ctx)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        if not standalone_mode:
            return super().main(*args, **kwargs)
        try:
            sys.exit(super().main(*args, **kwargs))
        except OptionMistake as error:
            message = error.format_message()
            if message.strip():  # help in place of a missing command is printed already
                print_error(f"{message.strip()} (see `{error.ctx.command_path if error.ctx else 'cskv'} --help`)")
            sys.exit(EXIT_MISTAKE)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a user's mistake into one red line and exit code 2, and Ctrl-C into one line and exit code 130."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except typer.Exit:
            raise
        except BrokenPipeError:
            # The reader of our output went away (`cskv ... | head`). Without this, Python complains again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (CSKVError, OSError) as error:
            fail(str(error), EXIT_MISTAKE)
        except (Interrupted, KeyboardInterrupt) as error:
            fail(str(error) or "interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            if _is_interruption(error):
                fail("interrupted", EXIT_INTERRUPTED)
            if type(error).__name__ != "OutOfMemoryError":  # torch's; named, because torch may not be imported yet
                raise
            fail(
                f"out of GPU memory: take shorter or fewer samples at a time, or --device-map auto ({error})",
                EXIT_MISTAKE,
            )

    return inner


def _is_interruption(error: BaseException | None) -> bool:
    """Return whether this began as Ctrl-C: C extensions that are interrupted while they are imported raise others."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def fail(message: str, code: int) -> NoReturn:
    """Print a message as one red line on standard error and leave with an exit code."""
    print_error(message)
    raise typer.Exit(code)


def print_error(message: str) -> None:
    """Print an error as one red line on standard error."""
    line = " ".join(message.split())
    console().print(f"[bold red]error:[/bold red] [red]{escape(line)}[/red]", soft_wrap=True)


def progress(*columns: str) -> Progress:
    """Return a progress bar on standard error, with time spent and left; `columns` are more task fields, as markup."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *map(TextColumn, columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        speed_estimate_period=3600.0,  # steps may take minutes, and the last seconds tell little of them
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

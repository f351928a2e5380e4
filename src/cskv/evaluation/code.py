"""Problems of code whose examples can be trusted, and whether a program passes."""

from __future__ import annotations

import functools
from collections.abc import Callable

from cskv.data.code import Function, functions, part
from cskv.errors import DataError
from cskv.evaluation.sandbox import run_confined


def passes(program: str) -> bool:
    """Tell whether a program, run confined, comes to its end."""
    return run_confined(program).finished


def problems(count: int, seed: int, fits: Callable[[Function], bool]) -> list[Function]:
    """Return functions of the standard library that can be asked for, of each module in turn.

    A function can be asked for if its own body passes its examples in the sandbox and an empty one does not.

    Args:
        count: how many.
        seed: picks the functions; see `cskv.data.code.part`.
        fits: tells whether there is room for a function in the prompt.

    Raises:
        DataError: there are fewer.
        CSKVError: this platform cannot confine a program.
    """
    found: list[Function] = []
    for function in part(functions(), seed):
        if len(found) == count:
            break
        if fits(function) and _can_tell(function):
            found.append(function)
    if len(found) < count:
        raise DataError(
            f"the standard library has {len(found)} functions for seed {seed} that fit and whose examples tell a right "
            f"body from an empty one; expected {count} cases: ask for fewer"
        )
    return found


@functools.cache
def _can_tell(function: Function) -> bool:
    empty = "\n" + " " * function.indent + "pass\n"
    return passes(function.program("\n" + function.body)) and not passes(function.program(empty))

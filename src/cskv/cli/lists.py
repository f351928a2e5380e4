"""Options that take several values: given again, or with commas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from cskv.cli.groups import GREATEST, check_number
from cskv.errors import ConfigError

MOST_LINES = 100_000  # of a LongEval record, some two million tokens
Number = TypeVar("Number", int, float)


def words(given: Iterable[str]) -> tuple[str, ...]:
    """Return all values, each once, in their order."""
    return tuple(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))


def numbers(
    option: str, given: Iterable[str], kind: Callable[[str], Number], below: int = GREATEST
) -> tuple[Number, ...]:
    """Return all values as numbers, each once, in their order.

    Raises:
        ConfigError: one is no such number, or beyond any use.
    """
    found = []
    for word in words(given):
        try:
            found.append(kind(word))
        except ValueError:
            wanted = "whole numbers" if kind is int else "numbers"
            raise ConfigError(f"{option} has {word!r}; expected {wanted}, with commas between them") from None
        check_number(option, found[-1], below)
    return tuple(dict.fromkeys(found))

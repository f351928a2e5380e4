"""Options that take several values: given again, or with commas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from cskv.errors import ConfigError

Number = TypeVar("Number", int, float)


def words(given: Iterable[str]) -> tuple[str, ...]:
    """All values, each once, in their order."""
    return tuple(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))


def numbers(option: str, given: Iterable[str], kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """All values as numbers, each once, in their order.

    Raises:
        ConfigError: one is no such number.
    """
    found = []
    for word in words(given):
        try:
            found.append(kind(word))
        except ValueError:
            wanted = "whole numbers" if kind is int else "numbers"
            raise ConfigError(f"{option} has {word!r}; expected {wanted}, with commas between them") from None
    return tuple(dict.fromkeys(found))

"""Rows of several seeds as one: what figures and tables of results are made of.

Scores are pooled over cases, perplexities in nats over tokens, agreement over tokens. Rows are those of
`cskv.evaluation.results`; they come from files, so every figure is checked before it is used.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from cskv.errors import DataError
from cskv.evaluation.agreement import bootstrap_interval
from cskv.evaluation.results import KEY, Row
from cskv.evaluation.settings import AGREEMENT, CONTINUATION, DEPARTURE, PERPLEXITY
from cskv.evaluation.wilson import wilson_interval


@dataclass(frozen=True)
class Value:
    """A figure and the range around it; `low` and `high` are None where there is none.

    The range is a 95 % interval: of a score over its cases, of all else over texts. Seeds are independent, so their
    intervals add in squares; rows without intervals give the least and the most of several seeds. A perplexity's is
    that of its distance from the uncompressed model's, as far as rows tell it: texts differ more than methods do, and
    alike for all of them.
    """

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cell:
    """Cases whose needle lies at one depth, from 0 (the beginning) to 1 (the end)."""

    depth: float
    n: int
    score: float


@dataclass(frozen=True)
class Stretch:
    """Agreement over the positions from `start` up to, but not including, `stop`."""

    start: int
    stop: int
    top1: float
    kl: float


@dataclass(frozen=True)
class Pooled:
    """One method at one budget on one task, all seeds together.

    Attributes:
        method, budget, task, size, protocol: as in a row.
        seeds: of the rows that went in, ascending.
        ratio, bytes_per_token: of the cache, means over seeds; None where a row tells none.
        n: cases (of tasks with a score) or tokens, summed.
        score, perplexity, top1, kl: those that the task has; None otherwise.
        cells: of needle tasks, by depth.
        positions: of agreement, in order.
        generated: tokens that were generated after each text, of departures.
        equal_tokens: how many of them were the uncompressed model's before the first that was not, mean over texts.
        median_equal: their median.
        still_equal: the share of texts that never differed.
    """

    method: str
    budget: float | None
    task: str
    size: int
    protocol: str | None
    seeds: tuple[int, ...]
    ratio: float | None
    bytes_per_token: float | None
    n: int
    score: Value | None = None
    perplexity: Value | None = None
    top1: Value | None = None
    kl: Value | None = None
    cells: tuple[Cell, ...] = ()
    positions: tuple[Stretch, ...] = ()
    generated: int | None = None
    equal_tokens: Value | None = None
    median_equal: float | None = None
    still_equal: Value | None = None


def pool(rows: Iterable[Row]) -> list[Pooled]:
    """Pool the rows that differ in nothing but their seed, in order of first appearance.

    Raises:
        DataError: a row lacks a figure that its task has, or holds something else in its place.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        _check_key(row)
        groups[row["method"], row["budget"], row["task"], row["size"], row["protocol"]].append(row)
    return [_pooled(group) for group in groups.values()]


def pool_scores(parts: Sequence[tuple[int, float]]) -> Value:
    """Return the mean of (cases, score) weighted by cases, with Wilson's interval of all cases together."""
    n = sum(cases for cases, _ in parts)
    successes = min(float(n), sum(cases * score for cases, score in parts))
    return Value(successes / n, *wilson_interval(successes, n))


def _pooled(rows: Sequence[Row]) -> Pooled:
    first = rows[0]
    pooled = {
        **{name: first[name] for name in ("method", "budget", "task", "size", "protocol")},
        "seeds": tuple(sorted({row["seed"] for row in rows if row["seed"] is not None})),
        **{name: _cache_mean(rows, name) for name in ("ratio", "bytes_per_token")},
    }
    figures: dict[str, Any] = {}
    if first["task"] in (PERPLEXITY, CONTINUATION):
        figures |= _perplexity(rows)
    if first["task"] in (AGREEMENT, CONTINUATION, DEPARTURE):
        figures |= _agreement(rows)
    if first["task"] == DEPARTURE:
        figures |= _departure(rows)
    return Pooled(**pooled, **(figures or _accuracy(rows)))


def _accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    parts = [(_count(row, "n"), _number(row, "score", 0.0, 1.0)) for row in rows]
    if len(rows) == 1:  # its own interval, if it has one: the evaluation knows best how it was made
        own = [None if rows[0].get(name) is None else _number(rows[0], name, 0.0, 1.0) for name in ("low", "high")]
        score = Value(parts[0][1], *(own if None not in own else (None, None)))
    else:
        score = pool_scores(parts)
    return {"n": sum(n for n, _ in parts), "score": score, "cells": _cells(rows)}


def _cells(rows: Sequence[Row]) -> tuple[Cell, ...]:
    depths: dict[float, list[tuple[int, float]]] = defaultdict(list)
    for cell in _parts(rows, "cells"):
        depths[_number(cell, "depth")].append((_count(cell, "n"), _number(cell, "score", 0.0, 1.0)))
    return tuple(
        Cell(depth, sum(n for n, _ in parts), pool_scores(parts).mean) for depth, parts in sorted(depths.items())
    )


def _perplexity(rows: Sequence[Row]) -> dict[str, Any]:
    tokens = [_count(row, "tokens") for row in rows]
    nats = [
        math.log(_number(row, "perplexity", 1e-300)) if row.get("nll") is None else _number(row, "nll") for row in rows
    ]
    mean, low, high = _spread(nats, tokens)
    if all(row.get("reference_perplexity") is not None for row in rows):
        apart = [nat - math.log(_number(row, "reference_perplexity", 1e-300)) for nat, row in zip(nats, rows)]
        middle, *bounds = _spread(apart, tokens, [_interval(row, "nll_increase") for row in rows])
        low, high = (None if bound is None else mean + bound - middle for bound in bounds)
    values = (None if bound is None else math.exp(bound) for bound in (low, high))
    return {"n": sum(tokens), "perplexity": Value(math.exp(mean), *values)}


def _agreement(rows: Sequence[Row]) -> dict[str, Any]:
    tokens = [_count(row, "tokens") for row in rows]
    figures: dict[str, Any] = {"n": sum(tokens), "positions": _positions(rows)}
    for name, most in (("top1", 1.0), ("kl", math.inf)):
        intervals = [_interval(row, name, 0.0, most) for row in rows]
        mean, *bounds = _spread([_number(row, name, 0.0, most) for row in rows], tokens, intervals)
        figures[name] = Value(mean, *(None if bound is None else min(most, max(0.0, bound)) for bound in bounds))
    return figures


def _departure(rows: Sequence[Row]) -> dict[str, Any]:
    """Pool the texts of all seeds."""
    lengths = sorted({_count(row, "generated") for row in rows})
    if len(lengths) > 1:
        raise DataError(
            f"rows of {rows[0]['method']} on {DEPARTURE} generated {' and '.join(map(str, lengths))} tokens; those of "
            "one length can be pooled: leave the others out"
        )
    equal: list[int] = []
    for row in rows:
        counts = row.get("equal_tokens")
        if (
            not isinstance(counts, list)
            or not counts
            or not all(_is_number(c) and 0 <= c <= lengths[0] for c in counts)
        ):
            raise DataError(
                f"equal_tokens of {row['method']} on {DEPARTURE} are {counts!r}; expected a list of numbers from 0 to "
                f"{lengths[0]}"
            )
        equal += counts
    whole = sum(count == lengths[0] for count in equal)
    return {
        "generated": lengths[0],
        "equal_tokens": Value(fmean(equal), *(bootstrap_interval(equal) or ())),
        "median_equal": float(median(equal)),
        "still_equal": Value(whole / len(equal), *wilson_interval(whole, len(equal))),
    }


def _positions(rows: Sequence[Row]) -> tuple[Stretch, ...]:
    """Return means over seeds of the same stretch; every seed has as many tokens there."""
    stretches: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for part in _parts(rows, "positions"):
        where = (int(_number(part, "start", 0.0)), int(_number(part, "stop", 0.0)))
        stretches[where].append((_number(part, "top1", 0.0, 1.0), _number(part, "kl", 0.0)))
    return tuple(
        Stretch(start, stop, *(sum(column) / len(column) for column in zip(*parts, strict=True)))
        for (start, stop), parts in sorted(stretches.items())
    )


def _spread(
    values: Sequence[float], weights: Sequence[int], intervals: Sequence[tuple[float, float] | None] = ()
) -> tuple[float, float | None, float | None]:
    """Return the weighted mean and its interval; the least and the most of several without intervals of their own."""
    shares = [weight / sum(weights) for weight in weights]
    mean = sum(value * share for value, share in zip(values, shares, strict=True))
    known = [interval for interval in intervals if interval is not None]
    if len(known) == len(values):
        down, up = (
            math.hypot(*(share * (interval[side] - value) for value, share, interval in zip(values, shares, known)))
            for side in (0, 1)
        )
        return mean, mean - down, mean + up
    return (mean, min(values), max(values)) if len(values) > 1 else (mean, None, None)


def _interval(row: Row, name: str, least: float = -math.inf, most: float = math.inf) -> tuple[float, float] | None:
    """Return the 95 % interval of a figure, if the row has one."""
    bounds = row.get(f"{name}_interval")
    if bounds is None:
        return None
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise DataError(f"{name}_interval of {row['method']} on {row['task']} is {bounds!r}; expected two numbers")
    label, known = f"{name}_interval", {"method": row["method"], "task": row["task"]}
    low = _number(known | {label: bounds[0]}, label, least, most)
    return low, _number(known | {label: bounds[1]}, label, low, most)


def _cache_mean(rows: Sequence[Row], name: str) -> float | None:
    known = [row["cache"] | {"task": row["task"], "method": row["method"]} for row in rows if row.get("cache")]
    values = [_number(cache, name, 0.0) for cache in known if cache.get(name) is not None]
    return sum(values) / len(values) if values else None


def _check_key(row: Row) -> None:
    texts = [row["method"], row["task"], "" if row["protocol"] is None else row["protocol"]]
    numbers = [row["size"], *(0 if row[name] is None else row[name] for name in ("seed", "budget"))]
    right = all(isinstance(text, str) for text in texts) and all(_is_number(number) for number in numbers)
    cache = row.get("cache")
    if not right or not (cache is None or isinstance(cache, dict)):
        found = ", ".join(f"{name} {row[name]!r}" for name in KEY)
        raise DataError(f"a row has {found}; expected names and numbers there, and a cache that is an object")


def _parts(rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """Return the objects in a list of each row, with the row's names for error messages."""
    parts = []
    for row in rows:
        listed = row.get(name) or []
        if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
            raise DataError(
                f"{name} of {row['method']} on {row['task']} are no list of objects; evaluate that row anew"
            )
        parts += [part | {"method": row["method"], "task": row["task"]} for part in listed]
    return parts


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(row: Row, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    value = row.get(name)
    if not isinstance(value, (int, float)) or not _is_number(value) or not least <= value <= most:
        raise DataError(
            f"{name} of {row['method']} on {row['task']} is {value!r}; expected a number from {least:g} to {most:g}"
        )
    return float(value)


def _count(row: Row, name: str) -> int:
    return int(_number(row, name, 1.0))

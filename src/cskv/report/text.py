"""Figures and names, as the page writes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime

DASH = "–"


def count_text(value: float) -> str:
    """Write a whole number with thousands set apart."""
    return f"{value:,.0f}"


def percent_text(share: float) -> str:
    """Write a share as per cent, without the sign."""
    return "100" if share == 1 else f"{100 * share:.1f}"


def whole_text(share: float) -> str:
    """Write a share as whole per cent, without the sign: a bound of an interval is no more exact."""
    return f"{100 * share:.0f}"


def perplexity_text(value: float) -> str:
    """Write a perplexity; decimals say nothing about large ones."""
    return f"{value:.2f}" if value < 100 else count_text(value)


def kl_text(value: float) -> str:
    """Write a divergence in nats."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}"


def budget_text(budget: float | None) -> str:
    """Write a budget as per cent of the cache."""
    return "uncompressed" if budget is None else f"{100 * budget:g} %"


def range_text(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Write the least and the most, or the one figure if both are written alike; a dash for nothing."""
    if not values:
        return DASH
    least, most = write(min(values)), write(max(values))
    return least if least == most else f"{least}{DASH}{most}"


def task_text(task: str, sizes: Collection[int]) -> str:
    """Write a task with its sizes."""
    return sizes_text(task, sizes) if task == "lines" else f"{task}, {sizes_text(task, sizes)}"


def sizes_text(task: str, sizes: Collection[int]) -> str:
    """Write the sizes of a task, the least and the most of many: lines count lines, all others tokens."""
    listed = [count_text(size) for size in sorted(sizes)]
    text = " and ".join(listed) if len(listed) <= 2 else f"{listed[0]} to {listed[-1]}"
    return f"{text} {'lines' if task == 'lines' else 'tokens'}"


def date_text(date: object) -> str:
    """Write a date of ISO 8601 for a person; anything else as it is."""
    if not isinstance(date, str):
        return "undated"
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()

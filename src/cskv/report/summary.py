"""Pooled results as one table: a row per method and budget, the best of each budget marked."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from cskv.evaluation.pooling import Pooled, Value, pool_scores
from cskv.evaluation.settings import CONTINUATION, DEPARTURE
from cskv.plots.series import method_names
from cskv.report.text import count_text, kl_text, percent_text, perplexity_text, range_text, sizes_text, whole_text

COLUMNS = (
    "method", "budget", "task", "size", "protocol", "seeds", "bytes_per_token", "ratio", "n", "score", "low", "high",
    "perplexity", "perplexity_least", "perplexity_most", "top1", "kl", "kl_least", "kl_most", "generated",
    "equal_tokens", "equal_low", "equal_high", "median_equal", "still_equal", "best",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A figure of the table: over which results it goes, how it is read and written, and which is better."""

    title: str
    note: str
    points: list[Pooled]
    read: Callable[[Sequence[Pooled]], Value]
    write: Callable[[float], str]
    write_note: Callable[[float], str]
    more_is_better: bool


@dataclass(frozen=True)
class Entry:
    """One figure of one row: its text, a note below it, and whether it is the best of its budget."""

    text: str = "–"
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    method: str
    budget: float | None
    bytes_per_token: str
    ratio: str
    entries: list[Entry]


@dataclass(frozen=True)
class Table:
    """The table, its columns with notes, its rows grouped by budget, uncompressed ones first."""

    columns: list[tuple[str, str]]
    groups: list[list[Line]]


def summarise(points: Sequence[Pooled]) -> Table:
    """Make the table of all results.

    Scores of several sizes of one task and protocol are pooled over all their cases. An entry that lacks sizes which
    others have says so, and is not compared with them.
    """
    columns = _columns(points)
    budgets = sorted({point.budget for point in points}, key=lambda budget: (budget is not None, -(budget or 0.0)))
    groups = [_group(budget, points, columns) for budget in budgets]
    return Table([(column.title, column.note) for column in columns], groups)


def _columns(points: Sequence[Pooled]) -> list[Column]:
    columns = []
    for task, protocol in dict.fromkeys((p.task, p.protocol) for p in points if p.score is not None):
        own = [p for p in points if (p.task, p.protocol) == (task, protocol)]
        note = ", ".join([sizes_text(task, _sizes(own)), *([protocol] if protocol else [])])
        columns.append(Column(f"{task}, %", note, own, _pooled_score, percent_text, whole_text, True))
    for task, size in sorted({(p.task, p.size) for p in points if p.perplexity is not None}, reverse=True):
        own, note = _of_text(points, task, size)
        columns.append(Column("perplexity", note, own, _figure("perplexity"), perplexity_text, perplexity_text, False))
    for size, made in sorted({(p.size, p.generated) for p in points if p.generated is not None}):
        own = [p for p in points if (p.size, p.generated) == (size, made)]
        note = f"of {count_text(made)}, after {count_text(size)}"
        columns.append(Column("equal tokens", note, own, _figure("equal_tokens"), count_text, count_text, True))
        columns.append(Column("equal to the end, %", note, own, _figure("still_equal"), percent_text, whole_text, True))
    for task, size in sorted({(p.task, p.size) for p in points if p.kl is not None}):
        own, note = _of_text(points, task, size)
        columns.append(Column("same choice, %", note, own, _figure("top1"), percent_text, percent_text, True))
        columns.append(Column("KL, nats", f"per token, {note}", own, _figure("kl"), kl_text, kl_text, False))
    return columns


def _of_text(points: Sequence[Pooled], task: str, size: int) -> tuple[list[Pooled], str]:
    """Return the points of a text task, and a note on the text's size and on how it was read."""
    note = sizes_text(task, [size])
    own = [point for point in points if (point.task, point.size) == (task, size)]
    return own, {CONTINUATION: f"{task} of {note}", DEPARTURE: f"generated after {note}"}.get(task, note)


def _pooled_score(points: Sequence[Pooled]) -> Value:
    known = [(point.n, point.score) for point in points if point.score is not None]
    return known[0][1] if len(known) == 1 else pool_scores([(n, score.mean) for n, score in known])


def _figure(name: str) -> Callable[[Sequence[Pooled]], Value]:
    """Return what reads one figure of what is of one task and size, and so at most one point."""
    return lambda points: getattr(points[0], name)


def _group(budget: float | None, points: Sequence[Pooled], columns: Sequence[Column]) -> list[Line]:
    """Make the rows of one budget, methods in the order of the whole table."""
    present = [point for point in points if point.budget == budget]
    methods = [name for name in method_names(points) if any(point.method == name for point in present)]
    entries = [_entries(column, budget, methods) for column in columns]
    rows = []
    for index, method in enumerate(methods):
        own = [point for point in present if point.method == method]
        size = range_text([p.bytes_per_token for p in own if p.bytes_per_token is not None], count_text)
        ratio = range_text([p.ratio for p in own if p.ratio is not None], percent_text)
        rows.append(Line(method, budget, size, ratio, [column[index] for column in entries]))
    return rows


def _entries(column: Column, budget: float | None, methods: Sequence[str]) -> list[Entry]:
    """Write a figure of all methods at one budget, and mark the best of those that have all sizes."""
    sizes = _sizes(column.points)
    found = [[p for p in column.points if (p.method, p.budget) == (method, budget)] for method in methods]
    comparable = {column.read(own).mean for own in found if _sizes(own) == sizes}
    best = None if len(comparable) < 2 else max(comparable) if column.more_is_better else min(comparable)
    entries = []
    for own in found:
        if not own:
            entries.append(Entry())
            continue
        value = column.read(own)
        text = column.write(value.mean)
        bounds = [] if value.low is None or value.high is None else [value.low, value.high]
        note = range_text(bounds, column.write_note) if bounds else ""
        note = "" if note == text else note  # seeds that agree
        if _sizes(own) == sizes:
            entries.append(Entry(text, note, value.mean == best))
        else:
            entries.append(Entry(text, f"{note} ({len(own)} of {len(sizes)} sizes)".strip()))
    return entries


def _sizes(points: Sequence[Pooled]) -> set[int]:
    return {point.size for point in points}


def write_csv(points: Sequence[Pooled]) -> str:
    """Return all pooled results as CSV text: a row per method, budget, task, size and protocol.

    `best` is 1 where no other method of that budget is better, and some other is worse.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    kind = attrgetter("budget", "task", "size", "protocol")
    for point in points:
        names = [point.method, point.budget, point.task, point.size, point.protocol, " ".join(map(str, point.seeds))]
        figures = [*_three(point.score), *_three(point.perplexity), _three(point.top1)[0], *_three(point.kl)]
        figures += [point.generated, *_three(point.equal_tokens), point.median_equal, _three(point.still_equal)[0]]
        numbers = [point.bytes_per_token, point.ratio, point.n, *figures]
        merits = {_merit(other) for other in points if kind(other) == kind(point)}
        best = len(merits) > 1 and _merit(point) == max(merits)
        writer.writerow([*names, *("" if number is None else f"{number:.9g}" for number in numbers), int(best)])
    return text.getvalue()


def _three(value: Value | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if value is None else (value.mean, value.low, value.high)


def _merit(point: Pooled) -> float:
    if more_is_better := point.score or point.equal_tokens:
        return more_is_better.mean
    less_is_better = point.perplexity or point.kl
    return -less_is_better.mean if less_is_better is not None else 0.0

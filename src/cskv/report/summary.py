"""Pooled results as one table: a row per method and budget, the best of each budget marked."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cskv.evaluation.pooling import Pooled, Value, pool_scores
from cskv.evaluation.settings import CONTINUATION
from cskv.plots.series import method_names
from cskv.report.text import count_text, kl_text, percent_text, perplexity_text, range_text, sizes_text, whole_text

COLUMNS = (
    "method", "budget", "task", "size", "protocol", "seeds", "bytes_per_token", "ratio", "n", "score", "low", "high",
    "perplexity", "perplexity_least", "perplexity_most", "top1", "kl", "best",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A figure of the table: over which results it goes, how it is read and written, and which is better."""

    title: str
    note: str
    of: tuple[str, str | None, int | None]  # task, protocol, and the size where sizes are not pooled
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
    """The table of all results.

    Scores of several sizes of one task and protocol are pooled over all their cases. An entry that lacks sizes which
    others have says so, and is not compared with them.
    """
    columns = _columns(points)
    budgets = sorted({point.budget for point in points}, key=lambda budget: (budget is not None, -(budget or 0.0)))
    groups = [_group([point for point in points if point.budget == budget], points, columns) for budget in budgets]
    return Table([(column.title, column.note) for column in columns], groups)


def _columns(points: Sequence[Pooled]) -> list[Column]:
    columns = []
    for task, protocol in dict.fromkeys((p.task, p.protocol) for p in points if p.score is not None):
        sizes = {p.size for p in points if (p.task, p.protocol) == (task, protocol)}
        note = ", ".join([sizes_text(task, sizes), *([protocol] if protocol else [])])
        columns.append(
            Column(f"{task}, %", note, (task, protocol, None), _pooled_score, percent_text, whole_text, True)
        )
    for task, size in sorted({(p.task, p.size) for p in points if p.perplexity is not None}, reverse=True):
        of, note, read = (task, None, size), _text_note(task, size), _figure("perplexity")
        columns.append(Column("perplexity", note, of, read, perplexity_text, perplexity_text, False))
    for task, size in sorted({(p.task, p.size) for p in points if p.kl is not None}):
        of, note = (task, None, size), _text_note(task, size)
        columns.append(Column("same choice, %", note, of, _figure("top1"), percent_text, percent_text, True))
        columns.append(Column("KL, nats", f"per token, {note}", of, _figure("kl"), kl_text, kl_text, False))
    return columns


def _text_note(task: str, size: int) -> str:
    """Say whether a text was read from its beginning or continued, and its size."""
    size_text = sizes_text(task, [size])
    return f"{task} of {size_text}" if task == CONTINUATION else size_text


def _group(points: Sequence[Pooled], everything: Sequence[Pooled], columns: Sequence[Column]) -> list[Line]:
    """The rows of one budget, methods in the order of the whole table."""
    methods = [name for name in method_names(everything) if any(point.method == name for point in points)]
    found = [[_found(points, method, column) for column in columns] for method in methods]
    sizes = [_sizes([point for point in everything if _is_of(point, column)]) for column in columns]
    rows = []
    for method, figures in zip(methods, found, strict=True):
        entries = [_entry(figures[i], [row[i] for row in found], column, sizes[i]) for i, column in enumerate(columns)]
        own = [point for point in points if point.method == method]
        size = range_text([p.bytes_per_token for p in own if p.bytes_per_token is not None], count_text)
        ratio = range_text([p.ratio for p in own if p.ratio is not None], percent_text)
        rows.append(Line(method, own[0].budget, size, ratio, entries))
    return rows


def _entry(own: Sequence[Pooled], rivals: Sequence[Sequence[Pooled]], column: Column, sizes: set[int]) -> Entry:
    if not own:
        return Entry()
    value = column.read(own)
    bounds = [] if value.low is None or value.high is None else [value.low, value.high]
    note = range_text(bounds, column.write_note) if bounds else ""
    text = column.write(value.mean)
    note = "" if note == text else note  # seeds that agree
    if _sizes(own) != sizes:
        return Entry(text, f"{note} ({len(own)} of {len(sizes)} sizes)".strip())
    comparable = [column.read(rival).mean for rival in rivals if rival and _sizes(rival) == sizes]
    best = max(comparable) if column.more_is_better else min(comparable)
    return Entry(text, note, len(set(comparable)) > 1 and value.mean == best)


def _found(points: Sequence[Pooled], method: str, column: Column) -> list[Pooled]:
    return [point for point in points if point.method == method and _is_of(point, column)]


def _is_of(point: Pooled, column: Column) -> bool:
    task, protocol, size = column.of
    return point.task == task and (size == point.size or (size is None and point.protocol == protocol))


def _sizes(points: Sequence[Pooled]) -> set[int]:
    return {point.size for point in points}


def _pooled_score(points: Sequence[Pooled]) -> Value:
    known = [(point.n, point.score) for point in points if point.score is not None]
    return known[0][1] if len(known) == 1 else pool_scores([(n, score.mean) for n, score in known])


def _figure(name: str) -> Callable[[Sequence[Pooled]], Value]:
    """Reads one figure of what is of one task and size, and so at most one point."""
    return lambda points: getattr(points[0], name)


def write_csv(points: Sequence[Pooled]) -> str:
    """All pooled results as CSV text: a row per method, budget, task, size and protocol.

    `best` is 1 where no other method of that budget is better, and some other is worse.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in points:
        figures = [*_three(point.score), *_three(point.perplexity), _three(point.top1)[0], _three(point.kl)[0]]
        names = [point.method, point.budget, point.task, point.size, point.protocol]
        seeds = " ".join(map(str, point.seeds))
        numbers = [point.bytes_per_token, point.ratio, point.n, *figures]
        writer.writerow([*names, seeds, *map(_number, numbers), int(_is_best(point, points))])
    return text.getvalue()


def _three(value: Value | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if value is None else (value.mean, value.low, value.high)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _is_best(point: Pooled, points: Iterable[Pooled]) -> bool:
    def kind(other: Pooled) -> tuple[object, ...]:
        return other.budget, other.task, other.size, other.protocol

    merits = [_merit(other) for other in points if kind(other) == kind(point)]
    return len(set(merits)) > 1 and _merit(point) == max(merits)


def _merit(point: Pooled) -> float:
    if point.score is not None:
        return point.score.mean
    less_is_better = point.perplexity or point.kl
    return -less_is_better.mean if less_is_better is not None else 0.0

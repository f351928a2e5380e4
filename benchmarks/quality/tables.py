"""Tables of results: a row per method and budget, a column per figure that at least one of them has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.pages import Table
from cskv.evaluation.decoding import CONTEXT_FIRST, IN_PREFILL
from cskv.evaluation.pooling import Pooled, Value, pool
from cskv.evaluation.results import Row, Run, read_run
from cskv.evaluation.settings import AGREEMENT, CONTINUATION, DEPARTURE, PERPLEXITY

NOTHING = "–"
Pair = tuple[str, float | None]


class Results:
    """The runs of a folder, by model and suite, and their rows pooled over seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, subject: str, suite: str) -> Run | None:
        """Return a run, or None where there is none."""
        path = self.folder / f"{subject}-{suite}.json"
        return read_run(path) if path.exists() else None

    def points(self, subject: str, *suites: str) -> Points:
        """Pool suites; what several have, like the uncompressed cache, is the first one's."""
        rows: list[Row] = []
        for suite in suites:
            run, seen = self.run(subject, suite), {_of(row) for row in rows}
            rows += [] if run is None else [row for row in run.rows if _of(row) not in seen]
        return Points(pool(rows))


def _of(row: Row) -> tuple[object, ...]:
    return row["method"], row["budget"], row["task"], row["protocol"]


class Points:
    """Pooled results by what they are of."""

    def __init__(self, points: Iterable[Pooled]) -> None:
        self.points = list(points)

    def find(self, pair: Pair, task: str, protocol: str | None = None) -> Pooled | None:
        """Return the result of a method at a budget, or None; of several sizes the largest."""
        found = [p for p in self.points if (p.method, p.budget, p.task, p.protocol) == (*pair, task, protocol)]
        return max(found, key=lambda p: p.size, default=None)

    def pairs(self, *methods: str) -> list[Pair]:
        """Return (method, budget) of these methods, or of all in order of first appearance, most bytes first.

        The uncompressed cache comes before all others.
        """
        pairs = dict.fromkeys((p.method, p.budget) for p in self.points)
        names = methods or tuple(dict.fromkeys(method for method, _ in pairs))
        chosen = (pair for pair in pairs if pair[0] in names)
        return sorted(chosen, key=lambda p: (p[1] is not None, names.index(p[0]), -(p[1] or 1.0)))

    def table(self, columns: Sequence[str], pairs: Sequence[Pair] | None = None, title: str = "") -> Table:
        """Make a row for every pair, and a column of each name in `COLUMNS` that somebody has a figure for."""
        pairs = self.pairs() if pairs is None else pairs
        named = {name: [COLUMNS[name](self, pair) for pair in pairs] for name in columns}
        kept = {name: cells for name, cells in named.items() if any(cell != NOTHING for cell in cells)}
        labels = [method if budget is None else f"{method}, {100 * budget:.3g} %" for method, budget in pairs]
        return Table(title, ("cache", *kept), [list(row) for row in zip(labels, *kept.values(), strict=True)])


def number(value: Value | None, digits: int) -> str:
    """Format a figure with what its seeds span."""
    if value is None:
        return NOTHING
    spans = "" if value.low is None or value.high is None else f" ({value.low:.{digits}f}-{value.high:.{digits}f})"
    return f"{value.mean:.{digits}f}{spans}"


def percent(value: Value | None) -> str:
    """Format a share with its interval."""
    if value is None:
        return NOTHING
    if value.low is None or value.high is None:
        return f"{100 * value.mean:.0f} %"
    return f"{100 * value.mean:.0f} % ({100 * value.low:.0f}-{100 * value.high:.0f})"


def _of_text(read: Callable[[Pooled], Value | None], digits: int, *tasks: str) -> Callable[[Points, Pair], str]:
    """Return a column of the first of these tasks that was measured."""

    def cell(points: Points, pair: Pair) -> str:
        found = (points.find(pair, task) for task in tasks)
        point = next((point for point in found if point is not None and read(point) is not None), None)
        return NOTHING if point is None else number(read(point), digits)

    return cell


def _score(task: str, protocol: str | None) -> Callable[[Points, Pair], str]:
    def cell(points: Points, pair: Pair) -> str:
        point = points.find(pair, task, protocol)
        return NOTHING if point is None else percent(point.score)

    return cell


def _share(points: Points, pair: Pair) -> str:
    """Format the allocated bytes, means over what was prefilled for the tasks."""
    found = (points.find(pair, *of) for of in ((AGREEMENT,), (CONTINUATION,), (DEPARTURE,), ("code", CONTEXT_FIRST)))
    point = next((point for point in found if point is not None), None)
    return NOTHING if point is None or point.ratio is None else f"{point.ratio:.1%}"


def _equal(points: Points, pair: Pair) -> str:
    """Format how many generated tokens are the uncompressed model's before the first that is not."""
    point = points.find(pair, DEPARTURE)
    return NOTHING if point is None else f"{number(point.equal_tokens, 0)} of {point.generated}"


def _never(points: Points, pair: Pair) -> str:
    point = points.find(pair, DEPARTURE)
    return NOTHING if point is None else percent(point.still_equal)


COLUMNS: dict[str, Callable[[Points, Pair], str]] = {
    "bytes": _share,
    "KL": _of_text(lambda p: p.kl, 4, AGREEMENT),
    "perplexity": _of_text(lambda p: p.perplexity, 2, PERPLEXITY),
    "same token": lambda points, pair: _same(points, pair),
    "KL, continuation": _of_text(lambda p: p.kl, 4, CONTINUATION),
    "perplexity, continuation": _of_text(lambda p: p.perplexity, 2, CONTINUATION),
    "lines": _score("lines", IN_PREFILL),
    "lines, context first": _score("lines", CONTEXT_FIRST),
    "needles, context first": _score("niah-single", CONTEXT_FIRST),
    "frequent words, context first": _score("fwe", CONTEXT_FIRST),
    "tokens until it departs": _equal,
    "never departs": _never,
    "KL along the text": _of_text(lambda p: p.kl, 4, DEPARTURE),
    "code": _score("code", CONTEXT_FIRST),
}


def _same(points: Points, pair: Pair) -> str:
    point = points.find(pair, AGREEMENT) or points.find(pair, CONTINUATION)
    return NOTHING if point is None or point.top1 is None else f"{point.top1.mean:.1%}"

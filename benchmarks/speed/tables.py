"""Tables of the decode benchmark's results, and the goals that decoding was given: what was measured of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.common import Row
from benchmarks.pages import Table
from benchmarks.speed.methods import BEST, FLASH, IN_INT8, POSITIONS, SDPA, methods, on_a_gpu
from benchmarks.speed.problem import KINDS, PER_HEAD
from benchmarks.speed.timing import slope

K = 1024
NAMES = (*methods(), *on_a_gpu())
# How many times as fast as FlashDecoding on uncompressed keys and values.
GPU_GOALS = {
    "grouped": 3.0, PER_HEAD: 3.0, "commuting": 3.0, "grouped, 4 bits": 6.0, f"{PER_HEAD}, 4 bits": 6.0,
    "commuting, 4 bits": 6.0, "joint": 1.3, IN_INT8: 2.0,
}  # fmt: skip
COPY = "copy bandwidth"  # the row that is no cell
Found = float | None
Show = Callable[[Row, str], str]


def cells(results: dict[str, Any], batch: int | None = None) -> list[Row]:
    """Return the rows of a length and batch size, or of one batch size those that were not skipped, by length."""
    rows = sorted((row for name, row in results["rows"].items() if name != COPY), key=lambda row: row["tokens"])
    return rows if batch is None else [row for row in rows if row["batch"] == batch and "skipped" not in row]


def batches(results: dict[str, Any]) -> list[int]:
    """Return the batch sizes that were measured."""
    return sorted({row["batch"] for row in cells(results) if "skipped" not in row})


def median(row: Row, name: str, how: str = "seconds") -> Found:
    """Return the seconds of a step, a "call" of attention or its replay as a "graph"; None where there are none.

    Where no graph could be captured, its seconds are those of a call.
    """
    own = row["methods"].get(name, {})
    return own.get(how, own.get("call", {}) if how == "graph" else {}).get("median")


def speedup(row: Row, name: str, baseline: str, how: str = "seconds") -> Found:
    """Return how many times faster a method is than a baseline."""
    ours, theirs = median(row, name, how), median(row, baseline, how)
    return None if ours is None or theirs is None else theirs / ours


def decode_tables(results: dict[str, Any]) -> list[Table]:
    """Make all tables of a run: on a GPU with the goals."""
    return [*tables(results), *([gpu_goals(results)] if results["settings"]["device"] == "cuda" else [])]


def tables(results: dict[str, Any]) -> list[Table]:
    """Make speedups per batch size, slopes, and bytes; on a GPU milliseconds and the attention call as well."""
    shows: dict[str, Show] = {f"times as fast as {baseline}": partial(_as_fast, baseline) for baseline in (SDPA, BEST)}
    if results["settings"]["device"] == "cuda":
        shows["milliseconds a step, median (10th-90th percentile)"] = _milliseconds
        shows["the attention call, microseconds launched and replayed, share of a copy"] = partial(_call, results)
    found, measured = [], {batch: cells(results, batch) for batch in batches(results)}
    for batch, rows in measured.items():
        found += [_over_lengths(f"Batch {batch}: {what}", rows, show) for what, show in shows.items()]
    if results["settings"]["device"] == "cpu" and results["rows"].get(COPY):
        moved = results["rows"][COPY]["bytes_per_second"]["median"] / 1e9
        title = f"Bytes of the cache read a second, as a share of what a copy moves ({moved:.1f} GB/s), batch "
        of_copy = partial(_of_copy, results)
        found += [_over_lengths(f"{title}{batch}", rows, of_copy) for batch, rows in measured.items() if batch == 1]
    title = f"Bytes allocated, as a share of {SDPA}'s (batch {min(measured, default='-')})"
    found += [_slopes(results), _over_lengths(title, next(iter(measured.values()), []), _share)]
    skipped = _skipped(results)
    return [*found, skipped] if skipped.rows else found


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in NAMES if any(median(row, name) is not None for row in rows)]


def _thousands(tokens: int) -> str:
    return f"{tokens // K}K" if tokens % K == 0 else str(tokens)


def _over_lengths(title: str, rows: Sequence[Row], show: Show) -> Table:
    """Make a table with a column per length and a row per method that there is anything to show of."""
    lines = [(name, *(show(row, name) for row in rows)) for name in _names(rows)]
    return Table(
        title, ("method", *(_thousands(row["tokens"]) for row in rows)), [line for line in lines if any(line[1:])]
    )


def _as_fast(baseline: str, row: Row, name: str) -> str:
    value = None if name == POSITIONS else speedup(row, name, baseline)
    return "" if value is None else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def _milliseconds(row: Row, name: str) -> str:
    s = row["methods"][name].get("seconds")
    return "" if s is None else f"{1e3 * s['median']:.3f} ({1e3 * s['p10']:.3f}-{1e3 * s['p90']:.3f})"


def _call(results: dict[str, Any], row: Row, name: str) -> str:
    launched, replayed = (median(row, name, how) for how in ("call", "graph"))
    if launched is None or replayed is None:
        return ""
    return f"{1e6 * launched:.0f}, {1e6 * replayed:.0f}, {_over_copy(results, row, name, 'graph') or math.nan:.0%}"


def _of_copy(results: dict[str, Any], row: Row, name: str) -> str:
    share = _over_copy(results, row, name, "seconds")
    return f"{share:.0%}" if share else ""


def _share(row: Row, name: str) -> str:
    own = row["methods"].get(name, {}).get("nbytes", 0) / row["methods"][SDPA]["nbytes"]
    return f"{own:.1%}" if own else ""


def slopes(results: dict[str, Any], batch: int) -> dict[str, float]:
    """Return nanoseconds per cached token and sequence of every method, by least squares over the lengths."""
    rows = cells(results, batch)
    points = {name: [(row["tokens"], median(row, name)) for row in rows] for name in _names(rows)}
    return {name: 1e9 / batch * slope([(x, y) for x, y in own if y is not None]) for name, own in points.items()}


def _slopes(results: dict[str, Any]) -> Table:
    """Show them as shares of the baseline's on a CPU, in nanoseconds on a GPU."""
    by_batch = {batch: slopes(results, batch) for batch in batches(results)}
    is_gpu = results["settings"]["device"] == "cuda"

    def show(found: dict[str, float], name: str) -> str:
        value = found.get(name, math.nan) / (1.0 if is_gpu else found[SDPA])
        return "" if math.isnan(value) else f"{value:.3f}"

    names = [name for name in NAMES if any(name in found for found in by_batch.values())]
    lines = [(name, *(show(found, name) for found in by_batch.values())) for name in names]
    unit = "nanoseconds per cached token and sequence" if is_gpu else f"as a share of {SDPA}'s"
    title = f"Slope of a step's time over the cached tokens (least squares), {unit}"
    return Table(title, ("method", *(f"batch {batch}" for batch in by_batch)), lines)


def _skipped(results: dict[str, Any]) -> Table:
    rows = cells(results)
    lines = {(f"batch {r['batch']}, {_thousands(r['tokens'])}", r["skipped"]) for r in rows if "skipped" in r}
    for row in rows:
        methods_of = row.get("methods", {}).items()
        lines |= {(name, m[why]) for name, m in methods_of for why in ("skipped", "failed") if why in m}
    return Table("Not measured", ("what", "why"), sorted(lines))


def cpu_goals(decode: dict[str, Any], on_models: dict[str, Any]) -> Table:
    """Compare with the goals on two cores, 80 % of the channels left out: of a layer, and of SmolLM2 end to end."""
    short, long = _row(decode, 1, 16 * K), _row(decode, 1, 64 * K)
    whole = on_models["rows"].get("smollm2, 1024", {"methods": {}})
    in_16, kernels = {"commuting": 4, "grouped": 1, "joint": 1 if "amx" in kernels_of(decode) else 0.7}, []
    for name, least in (in_16 | {"commuting, 4 bits": 5}).items():
        kernels.append((f"{name}, 16K: >= {least:g}x the best uncompressed path", least, speedup(short, name, BEST)))
    goals: list[tuple[str, float, Found]] = [
        *kernels,
        ("commuting, 16K: >= 10x transformers' sdpa path", 10, speedup(short, "commuting", SDPA)),
    ]
    for kind in KINDS:
        goal = f"{kind}, 64K: 4 bits no slower than bf16 latents"
        goals.append((goal, 1, speedup(long, f"{kind}, 4 bits", kind)))
    for name in ("joint", "joint, 4 bits", "commuting", "commuting, 4 bits"):
        slower = speedup(whole, name, "uncompressed, sdpa", "tokens_per_second")
        goal = f"SmolLM2 after 1K tokens, {name}: >= 0.9x the uncompressed cache's tokens/s"
        goals.append((goal, 0.9, None if slower is None else 1 / slower))
    lines = [(goal, *_verdict(least, found, _times)) for goal, least, found in goals]
    return Table("Goals on a CPU, two cores, batch 1", ("goal", "measured", "met"), lines)


def kernels_of(results: dict[str, Any]) -> str:
    """Return the level of instructions of the compiled kernels that were measured."""
    return str(results["settings"].get("kernels", "none"))


def gpu_goals(results: dict[str, Any]) -> Table:
    """Compare with those on a GPU at 64K tokens, of whole steps and of replays of the attention call alone."""
    lines = []
    for batch in (1, 8):
        row = _row(results, batch, 64 * K)
        for name, least in GPU_GOALS.items():
            hows = ("seconds", "graph")
            faster = [_verdict(least, speedup(row, name, baseline(row), how), _times) for how in hows]
            goals = {f">= {least:g}x FlashDecoding": faster}
            if name.startswith("commuting"):  # nothing is rebuilt
                of_copy = [_verdict(0.6, _over_copy(results, row, name, how), "{:.0%}".format) for how in hows]
                goals[">= 60 % of copy bandwidth"] = of_copy
            for goal, ((step, met), (call, also)) in goals.items():
                lines.append((f"batch {batch}, {name}: {goal}", step, call, f"{met or '-'} / {also or '-'}"))
    headings = ("goal", "whole step", "attention call, replayed", "met (step / call)")
    return Table("Goals on a GPU, 64K tokens", headings, lines)


def calls_at_a_glance(results: dict[str, Any]) -> Table:
    """Show the attention call in microseconds, how many times as fast as FlashDecoding it is, and of a copy's speed."""
    rows = sorted((row for row in cells(results) if "methods" in row), key=lambda row: (-row["tokens"], row["batch"]))
    if results["rows"].get(COPY):
        moved = results["rows"][COPY]["bytes_per_second"]["median"] / 1e12
        title = f"The attention call, replayed: microseconds, x FlashDecoding, share of a copy's {moved:.2f} TB/s"
    else:
        title = "The attention call: microseconds, x FlashDecoding"

    def show(row: Row, name: str) -> str:
        seconds = median(row, name, "graph")
        if seconds is None:
            return ""
        times, share = speedup(row, name, baseline(row), "graph"), _over_copy(results, row, name, "graph")
        shown = [
            f"{1e6 * seconds:.0f}",
            "" if times is None else f"{times:.2f}x",
            "" if share is None else f"{share:.0%}",
        ]
        return " ".join(part for part in shown if part)

    lines = [(name, *(show(row, name) for row in rows)) for name in _names(rows)]
    headings = ("method", *(f"{row['batch']} x {_thousands(row['tokens'])}" for row in rows))
    return Table(title, headings, [line for line in lines if any(line[1:])])


def baseline(row: Row) -> str:
    """Return what stands for FlashDecoding: the fastest uncompressed method where that was not measured by itself."""
    return BEST if median(row, FLASH) is None else FLASH


def _row(results: dict[str, Any], batch: int, tokens: int) -> Row:
    row = results["rows"].get(f"{batch} x {tokens}", {})
    return row if "methods" in row else {"methods": {}}


def _over_copy(results: dict[str, Any], row: Row, name: str, how: str) -> Found:
    """Return the cache's bytes read per second, as a share of what a copy moves (read and written)."""
    copy, seconds = results["rows"].get(COPY), median(row, name, how)
    if copy is None or seconds is None:
        return None
    return row["methods"][name]["read_nbytes"] / seconds / copy["bytes_per_second"]["median"]


def _verdict(least: float, found: Found, show: Callable[[float], str]) -> tuple[str, str]:
    if found is None:
        return "not measured", ""
    return show(found), "yes" if found >= least else "**no**"


def _times(value: float) -> str:
    return f"{value:.2f}x"

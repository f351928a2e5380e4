"""The goals that decoding was given, what was measured of each, and whether it was met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import Row
from decode_methods import BEST, SDPA
from decode_tables import median, speedup
from pages import Table

K = 1024
Found = float | None


def _row(results: dict[str, Any], batch: int, tokens: int) -> Row | None:
    row = results.get("rows", {}).get(f"{batch} x {tokens}")
    return None if row is None or "methods" not in row else row


def _speedup(results: dict[str, Any], batch: int, tokens: int, name: str, baseline: str) -> Found:
    row = _row(results, batch, tokens)
    return None if row is None else speedup(row, name, baseline)


def _over_copy(results: dict[str, Any], batch: int, tokens: int, name: str) -> Found:
    """Bytes of the cache read per second of a step, as a share of what a copy moves (read and written)."""
    row, copy = _row(results, batch, tokens), results.get("copy_bytes_per_second")
    seconds = None if row is None else median(row, name)
    if row is None or copy is None or seconds is None:
        return None
    return row["methods"][name]["read_nbytes"] / seconds / copy


def _calls(results: dict[str, Any], batch: int, tokens: int, name: str) -> tuple[Found, Found]:
    """Return, of the attention call alone, times as fast as the best uncompressed one, and the share of a copy."""
    found = results.get("attention_calls", {}).get(f"{batch} x {tokens}", {})
    if name not in found or BEST not in found:
        return None, None
    ours, theirs = (found[of].get("graph", found[of]["eager"])["median"] for of in (name, BEST))
    return theirs / ours, found[name]["share_of_copy"]


def _decoding(results: dict[str, Any], name: str) -> Found:
    row = _row(results, 1, 16 * K)
    if row is None or name not in row["methods"]:
        return None
    speeds = [row["methods"][of]["tokens_per_second"]["median"] for of in (name, "uncompressed, sdpa")]
    return speeds[0] / speeds[1]


def _line(goal: str, least: float, found: Found, show: Callable[[float], str]) -> tuple[str, str, str]:
    if found is None:
        return goal, "not measured", ""
    return goal, show(found), "yes" if found >= least else "**no**"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def cpu_goals(decode: dict[str, Any], generation: dict[str, Any]) -> Table:
    """The goals on two cores, 80 % of the channels left out."""
    at = (decode, 1, 16 * K)
    packed = {kind: _speedup(decode, 1, 64 * K, f"{kind}, 4 bits", kind) for kind in ("joint", "grouped", "commuting")}
    lines = [
        _line("commuting keys, 16K: >= 10x transformers' sdpa path", 10, _speedup(*at, "commuting", SDPA), _times),
        _line("commuting keys, 16K: >= 2x the best uncompressed path", 2, _speedup(*at, "commuting", BEST), _times),
        _line("joint keys, 16K: faster than transformers' sdpa path", 1, _speedup(*at, "joint", SDPA), _times),
    ]
    lines += [
        _line(f"{kind} keys, 64K: 4 bits no slower than bf16 latents", 1, found, _times)
        for kind, found in packed.items()
    ]
    lines += [
        _line(
            f"end to end, 16K, {name}: tokens/s at least the uncompressed cache's",
            1,
            _decoding(generation, name),
            _times,
        )
        for name in ("joint", "joint, 4 bits", "commuting", "commuting, 4 bits")
    ]
    return _table("Goals on a CPU, two cores, batch 1", lines)


def gpu_goals(results: dict[str, Any]) -> Table:
    """The goals on a GPU at 64K tokens, of whole steps and of the attention call alone, replayed as a CUDA graph."""
    lines = []
    for batch in (1, 8):
        at = (results, batch, 64 * K)
        for kind in ("joint", "grouped", "commuting"):
            for name, share, least in ((kind, "80 %", 3), (f"{kind}, 4 bits", "95 %", 6)):
                faster, of_copy = _calls(*at, name)
                what = f"batch {batch}, {kind}, {share}"
                lines += [
                    _both(f"{what}: >= {least}x FlashDecoding", least, _speedup(*at, name, BEST), faster, _times),
                    _both(f"{what}: >= 60 % of copy bandwidth", 0.6, _over_copy(*at, name), of_copy, "{:.0%}".format),
                ]
    headings = ("goal", "whole step", "attention call, replayed", "met (step / call)")
    return Table("Goals on a GPU, 64K tokens", headings, tuple(lines))


def _both(goal: str, least: float, step: Found, call: Found, show: Callable[[float], str]) -> tuple[str, ...]:
    (_, first, met), (_, second, also) = (_line(goal, least, found, show) for found in (step, call))
    return goal, first, second, f"{met or '-'} / {also or '-'}"


def _table(title: str, lines: list[tuple[str, str, str]]) -> Table:
    return Table(title, ("goal", "measured", "met"), tuple(lines))

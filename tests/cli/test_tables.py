"""Tables of results on terminals of several widths."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from cskv.cli.tables import results_tables
from cskv.evaluation.results import Run

TASKS = ("lines", "niah-single", "niah-multikey", "vt", "cwe", "fwe")
METHODS = (("uncompressed", None), ("QuantizedCache (hqq)", 0.125), ("CSKV, a rather long name of a method", 0.05))


@pytest.fixture
def run() -> Run:
    rows = [
        {
            "method": method,
            "budget": budget,
            "task": task,
            "size": 1024,
            "protocol": protocol,
            "seed": 0,
            "n": 50,
            "score": 0.5,
            "low": 0.4,
            "high": 0.6,
            "cache": {"ratio": 0.25, "bytes_per_token": 123456.0},
        }
        for method, budget in METHODS
        for task in TASKS
        for protocol in ("in-prefill", "context-first")
    ]
    return Run(Path("results.json"), {}, {"name": "a model", "type": "llama"}, {}, {}, rows)


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_results_fit_the_terminal_and_no_word_is_broken(run: Run, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(*results_tables(run, console), sep="\n")
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = set(re.findall(r"[\w-]+", text))
    known = set(re.findall(r"[\w-]+", " ".join([*TASKS, *(name for name, _ in METHODS)])))
    known |= {"bytes", "per", "token", "of", "uncompressed", "cache", "in-prefill", "context-first", "tokens", "lines"}
    known |= {"a", "model", "means", "all", "seeds", "25", "0", "12", "5", "50", "123", "456", "1", "024"}
    assert words <= known
    assert text.count("50.0") == len(METHODS) * len(TASKS) * 2  # every figure, once


def test_what_does_not_fit_goes_on_below_with_the_same_rows(run: Run) -> None:
    narrow, wide = (len(results_tables(run, Console(width=width))) for width in (80, 300))
    assert (narrow, wide) == (4, 1)

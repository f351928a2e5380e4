"""Results as data: one JSON file per run, written after every row, never overwritten by another run.

    {
      "format": "cskv-evaluation", "version": 1,
      "settings":    {...},      everything that decides the figures
      "model":       {"name", "type", "layers", "kv_dim", "parameters", "dtype", "fingerprint"},
      "environment": {...},      machine, versions and date (`cskv.evaluation.environment`)
      "methods":     {name: {...}},   what each method is
      "rows":        [{...}, ...]
    }

A row is one method on one task with one seed:

    method       a series of a figure, for instance "PCA" or "StreamingLLM"
    budget       the share of the cache that the method is meant to keep, or null (uncompressed)
    task, size   "lines" and lines, another question and tokens of its prompt, "perplexity", "agreement",
                 "continuation" or "departure" and tokens of the text
    protocol     "in-prefill" or "context-first"; null for texts
    seed
    n, score, low, high        cases, their mean score in [0, 1] and its 95 % interval    (all questions; code: passes)
    cells                      [{"depth", "n", "score"}, ...]                             (needles)
    tokens, perplexity, nll    and perplexity_interval, 95 % over texts; the uncompressed model's reference_perplexity,
                               and nll_increase over it, with its interval                (perplexity, continuation)
    tokens, top1, kl, positions    share of equal first choices, nats per token, their intervals, and both over
                                   stretches of positions [{"start", "stop", "top1", "kl"}, ...]; of the uncompressed
                                   cache, what rounding alone does to them
                                                             (agreement, continuation, departure: of the generated text)
    n, generated, equal_tokens     texts, tokens generated after each, and how many were the uncompressed model's,
    mean_equal, median_equal       of each; mean, median, and the share that never differed, with 95 % intervals
    still_equal                                                                           (departure)
    reading      "whole" or "pieces": how texts were read (`cskv.evaluation.agreement`)
    speed        {"device", "seconds", "tokens_per_second"}: what the method took for all texts or questions, and prompt
                 tokens or tokens of texts by it; of questions also `prefill_seconds` (the mean time to the first token)
                 and `decode_tokens_per_second`. On a CPU these are times on the wall, of whatever else ran as well; and
                 only what was read in the same way compares
    cache        bytes that are really allocated after the prompt (`cskv.CacheReport`, with `ratio` and
                 `bytes_per_token`)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskv.errors import DataError
from cskv.files import write_text

FORMAT, VERSION = "cskv-evaluation", 1
KEY = ("method", "budget", "task", "size", "protocol", "seed")

Row = dict[str, Any]


@dataclass
class Run:
    """One run's settings and rows.

    Attributes:
        path: its file.
        settings, model, environment, methods, rows: see the module's docstring.
    """

    path: Path
    settings: dict[str, Any]
    model: dict[str, Any]
    environment: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    rows: list[Row]

    def has(self, **key: Any) -> bool:
        """Tell whether there is a row of these six values of `KEY`."""
        return any(all(row[name] == key[name] for name in KEY) for row in self.rows)

    def add(self, *rows: Row) -> None:
        """Add rows that belong together and write the file, atomically."""
        self.rows.extend(rows)
        self.save()

    def save(self) -> None:
        """Write the file, atomically; a row is a line."""
        content = {"format": FORMAT, "version": VERSION}
        content |= {name: getattr(self, name) for name in ("settings", "model", "environment", "methods")}
        head = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        rows = ",\n".join("  " + json.dumps(row, sort_keys=True, allow_nan=False) for row in self.rows)
        write_text(self.path, f'{head.removesuffix(chr(10) + "}")},\n "rows": [\n{rows}\n ]\n}}\n')


def read_run(path: str | Path) -> Run:
    """Read a result file.

    Raises:
        DataError: there is none, or it is no result file of a version that is known here.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the results {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is no result file; expected JSON that `cskv evaluate` wrote")
    if content.get("version") != VERSION:
        raise DataError(f"{path} is of version {content.get('version')!r}; this cskv reads version {VERSION}")
    try:
        run = Run(path, *(content[name] for name in ("settings", "model", "environment", "methods", "rows")))
        missing = sorted({name for row in run.rows for name in KEY if name not in row})
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no whole result file: {error} is missing or of another kind") from error
    if missing:
        raise DataError(f"rows of {path} lack {', '.join(missing)}; expected a file that `cskv evaluate` wrote")
    return run


def open_run(path: str | Path, settings: dict[str, Any], model: dict[str, Any], environment: dict[str, Any]) -> Run:
    """Start a run, or go on with an interrupted one of the same settings and model.

    Raises:
        DataError: the file holds another run, which is never overwritten.
    """
    path = Path(path)
    if not path.exists():
        return Run(path, settings, model, environment, {}, [])
    run = read_run(path)
    ours, theirs = (
        json.loads(json.dumps(values, sort_keys=True)) for values in (settings | model, run.settings | run.model)
    )
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise DataError(
            f"{path} holds a run of other settings ({', '.join(different)}); results are never overwritten: "
            "give another --output"
        )
    run.environment = environment
    return run

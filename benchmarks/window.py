"""What the exact window is worth: the demo's adapters at other windows. Run `make demo` first.

python benchmarks/window.py        # writes docs/results/window.json and prints a table
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

# Threads that spin while they wait halve the speed of whatever else runs on the machine; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import cskv
from cskv.atomic import write_text
from cskv.data.lines import make_case
from cskv.evaluation.environment import environment
from cskv.evaluation.longeval import evaluate_lines

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("50-trained", "80-svd", "80-asvd", "80-trained")
WINDOWS = (0, 16, 32)
NUM_LINES, CASES, GROUP = 200, 100, 32


def main() -> None:
    """LongEval-lines accuracy of every adapter at every window, groups of 32."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tinymodel" / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tinymodel" / "checkpoint")
    cases = [make_case(NUM_LINES, seed) for seed in range(CASES)]
    results: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(title=f"{CASES} LongEval questions on {NUM_LINES} lines, % right (95 % interval)")
    for heading in ("adapter", *(f"window {window}" for window in WINDOWS)):
        table.add_column(heading)
    for name in ADAPTERS:
        adapter = cskv.CSKVAdapter.from_pretrained(ROOT / "outputs" / "demo" / "adapters" / name)
        results[name] = {}
        for window in WINDOWS:
            adapter.config = dataclasses.replace(adapter.config, window=window, group=GROUP)
            with cskv.attach(model, adapter):
                lines = evaluate_lines(model, tokenizer, cases, batch_size=4, max_new_tokens=24)
            results[name][str(window)] = {"accuracy": lines.accuracy, "low": lines.low, "high": lines.high}
        cells = [
            f"{100 * r['accuracy']:.0f} ({100 * r['low']:.0f}-{100 * r['high']:.0f})" for r in results[name].values()
        ]
        table.add_row(name, *cells)
    facts = {"lines": NUM_LINES, "cases": CASES, "group": GROUP, "environment": environment().to_dict()}
    write_text(ROOT / "docs" / "results" / "window.json", json.dumps(facts | {"rows": results}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()

"""Write the demo's table into README.md from its committed results, so that no figure is typed by hand.

`python scripts/readme_table.py outputs/demo/results.json` takes over a demo: it copies the results and the figure into
docs/results and rewrites the table. Without an argument it rewrites the table from what is there; with `--check` it
exits with 1 if the table is another.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "demo.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- demo table: scripts/readme_table.py -->", "<!-- end of demo table -->"


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a demo's `results.json`, and a line on where it was measured."""
    rows, environment = results["rows"], results["environment"]
    lines = [
        "| cache | bytes per token | of uncompressed | LongEval lines (95 % interval) | perplexity | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval = f"{100 * row['accuracy']:.0f} % ({100 * row['low']:.0f}-{100 * row['high']:.0f})"
        lines.append(
            f"| {row['name']} | {row['bytes_per_token']:,.0f} | {100 * row['ratio']:.1f} % | {interval} | "
            f"{row['perplexity']:.2f} | {row['tokens_per_second']:.0f} |"
        )
    first = rows[0]
    tokens = first["details"]["cache"]["tokens"]
    lines += [
        "",
        f"Bundled model, {first['cases']} questions on records of {first['num_lines']} lines ({tokens:,} tokens), "
        f"{environment['accelerator'] or environment['cpu']} with {environment['threads']} threads, "
        f"torch {environment['torch']}, transformers {environment['transformers']}, {environment['date'][:10]}. "
        "Bytes are those of the tensors that the cache holds after the prompt, window, positions and slack included; "
        f"[all figures](docs/results/{RESULTS.name}), made by `make demo`.",
    ]
    return "\n".join(lines)


def filled(readme: str, results: dict[str, Any]) -> str:
    """The README with the table between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def take_over(path: Path) -> None:
    """Copy a demo's results and figure, with paths inside the repository made relative to it."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8").replace(f"{ROOT}/", "")
    RESULTS.write_text(json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(path.with_name("demo.png"), RESULTS.with_name("demo.png"))


def main() -> None:
    """Take over results, and rewrite or check README.md."""
    for argument in sys.argv[1:]:
        if argument != "--check":
            take_over(Path(argument))
    old = README.read_text(encoding="utf-8")
    new = filled(old, json.loads(RESULTS.read_text(encoding="utf-8")))
    if "--check" in sys.argv[1:]:
        sys.exit(0 if old == new else f"{README.name}'s table differs from {RESULTS}: run scripts/readme_table.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

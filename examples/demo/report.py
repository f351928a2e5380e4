"""The demo's table and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table


def results_table(rows: Sequence[dict[str, Any]], environment: dict[str, Any], seconds: float) -> Table:
    """Make a table with a row per variant; the caption says on what it was measured."""
    first = rows[0]
    prompt_tokens = first["details"]["cache"]["tokens"]
    table = Table(
        title=f"KV cache of {prompt_tokens} tokens, compressed along its channels",
        caption=(
            f"{first['cases']} LongEval questions on {first['num_lines']} lines; perplexity of held-out text read "
            f"through the cache; bytes include the exact window\n"
            f"{environment['accelerator'] or environment['cpu']}, {environment['threads']} threads; "
            f"torch {environment['torch']}, transformers {environment['transformers']}, cskv {environment['cskv']}; "
            f"{environment['date']}; {seconds:.0f} s in all"
        ),
    )
    for heading in ("cache", "bytes per token", "ratio", "lines accuracy (95 %)", "perplexity", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in rows:
        interval = f"{100 * row['accuracy']:.0f} % ({100 * row['low']:.0f}-{100 * row['high']:.0f})"
        ratio = f"{row['ratio']:.2f} ({1 / row['ratio']:.1f}x smaller)" if row["ratio"] < 1 else "1.00"
        table.add_row(
            row["name"],
            f"{row['bytes_per_token']:,.0f}",
            ratio,
            interval,
            f"{row['perplexity']:.2f}",
            f"{row['tokens_per_second']:.0f}",
        )
    return table


def example_panel(made: dict[str, Any]) -> Panel:
    """Show one answer from the compressed cache, with the bytes that it held."""
    right = "right" if made["expected"] in made["output"] else "wrong"
    text = (
        f"[dim]... (a record of {made['tokens']} tokens)\n{escape(made['prompt_end'].strip())}[/dim]\n"
        f"[bold]{escape(made['output'].strip())}[/bold]\n"
        f"[dim]expected {made['expected']}: {right}; the cache held {made['cache_bytes'] / 1e6:.2f} MB instead of "
        f"{made['uncompressed_bytes'] / 1e6:.2f} MB[/dim]"
    )
    return Panel(text, title="generated from the 80 % compressed cache, adapter reloaded from disk", expand=False)

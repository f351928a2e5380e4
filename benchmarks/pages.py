"""Presentation of results: tables for a page and for the terminal, and the page itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskv.files import write_text

DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class Table:
    """Headings and cells; a title of "" is left out."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return it for a page."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += ["| " + " | ".join(self.headings) + " |", "|" + "---|" * len(self.headings)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows])

    def print(self) -> None:
        """Print it, by rich where it is installed."""
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            print(self.markdown(), flush=True)
            return
        table = RichTable(title=self.title)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        Console().print(table)


def fill_page(page: Path, script: str, *parts: str, block: str = "") -> None:
    """Put paragraphs between a page's two markers of a script, or of one of the blocks that it makes."""
    begin = f"<!-- measured: benchmarks/{script}.py{block and ' '}{block} -->"
    end = f"<!-- end of {block or script} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    write_text(page, "\n\n".join([before + begin, *parts, end + rest.split(end)[1]]))


def command(script: str) -> str:
    """Return what runs a benchmark of a room ("speed/decode")."""
    room, name = script.split("/")
    return f"python -m benchmarks.{room} {name}"


def machine(where: Mapping[str, Any], *versions: str) -> str:
    """Describe an environment: processor, threads, versions ("NAME VERSION" beside torch's) and date."""
    device = where["accelerator"] or where["cpu"]
    return f"{device}, {where['threads']} thread(s), {', '.join(versions)}, {where['date'][:10]}"


def measured_on(where: Mapping[str, Any], script: str) -> str:
    """Describe on what and when rows were measured."""
    versions = (f"{name} {where[name]}" for name in ("torch", "transformers"))
    return f"Measured on {machine(where, *versions)}. Reproduce with `{command(script)}`."

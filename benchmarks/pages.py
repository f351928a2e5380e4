"""Presentation of results: tables for a page and for the terminal, the page itself, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskv.evaluation.pooling import pool_scores
from cskv.files import write_text
from cskv.plots.style import COLOURS, MARKERS, new_figure, save, styled

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
    """Return what runs a script of this folder, or of a room in it ("speed/decode")."""
    room, _, name = script.rpartition("/")
    return f"python -m benchmarks.{room} {name}" if room else f"python benchmarks/{name}.py"


def machine(where: Mapping[str, Any], *versions: str) -> str:
    """Describe an environment: processor, threads, versions ("NAME VERSION" beside torch's) and date."""
    device = where["accelerator"] or where["cpu"]
    return f"{device}, {where['threads']} thread(s), {', '.join(versions)}, {where['date'][:10]}"


def measured_on(where: Mapping[str, Any], script: str, rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Describe on what, when and from which seeds rows were measured."""
    seeds = sorted({row["seed"] for row in rows})
    versions = (f"{name} {where[name]}" for name in ("torch", "transformers"))
    text = f"Measured on {machine(where, *versions)}"
    if seeds:
        text += f"; seeds {', '.join(map(str, seeds))}; {rows[0]['cases']} questions per seed; means over seeds"
    return f"{text}. Reproduce with `{command(script)}`."


def accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format per cent right over all seeds, with the 95 % interval."""
    score = pool_scores([(row["cases"], row["accuracy"]) for row in rows])
    return f"{100 * score.mean:.0f} ({100 * score.low:.0f}-{100 * score.high:.0f})"


@styled
def draw_pair(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    xlabel: str,
    right: Mapping[str, Any],
    *,
    ticks: Sequence[int] = (),
) -> None:
    """Draw LongEval accuracy beside another figure, whose axes have the settings `right`.

    Points of `series` are (x, accuracy in per cent, the other figure). `ticks` are those of a logarithmic x axis, whose
    points are not connected; a linear one has its own.
    """
    figure = new_figure(11, 4.8)
    axes = figure.subplots(1, 2)
    for index, (name, points) in enumerate(series.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 6}
        style["linestyle"] = "none" if ticks else "-" if index < len(COLOURS) else "--"
        x, *figures = zip(*points, strict=True)
        for ax, y in zip(axes, figures, strict=True):
            ax.plot(x, y, label=name, **style)
    axes[0].set(ylabel="LongEval lines, % right", ylim=(-3, 103))
    axes[1].set(**right)
    for ax in axes:
        ax.set(xlabel=xlabel, **({"xscale": "log"} if ticks else {}))
        if ticks:
            ax.set_xticks(ticks, list(map(str, ticks)))
            ax.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)

"""`cskv report`: result files to one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cskv.cli.common import command, emit, say
from cskv.cli.outputs import check_writable


@command
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="JSON files of `cskv evaluate`, folders of them, and the spectra.csv of `cskv analyze`."),
    ],
    out: Annotated[Path, typer.Option("--out", "--output", "-o", help="Folder to write to.")],
    title: Annotated[str | None, typer.Option(help="Title of the page. [default: the model's name]")] = None,
) -> None:
    """Make one page of a model's results: tables, accuracy and perplexity over bytes, agreement, needles, spectra.

    Writes index.html, which needs no other file, each figure as a PNG, and summary.csv. Files of an earlier report in
    the same folder are replaced. Where runs overlap, the newest counts, and the page says so.

    Examples:

    * `cskv report outputs/evaluation --out outputs/report`
    * `cskv report first.json second.json outputs/analysis/my-model/spectra.csv --out outputs/report --title "My model"`
    """
    from cskv.report import gather, write_report
    from cskv.report.page import check_installed

    check_installed()
    check_writable(out / "index.html", out / "summary.csv")
    sources = gather(results)
    for path in sources.passed_over:
        say(f"{path} holds no results; passed over")
    written = write_report(sources, out, title)
    if written.replaced:
        say(f"{written.replaced} row(s) of older runs are left out: newer ones have the same method, task and seed")
    typer.echo(f"page    {written.page}")
    typer.echo(f"table   {written.table}")
    typer.echo(f"rows    {written.rows} of {len(sources.runs)} run(s), {len(written.figures)} figure(s)")
    emit(
        {
            "command": "report",
            "page": str(written.page),
            "table": str(written.table),
            "figures": [str(path) for path in written.figures],
            "rows": written.rows,
            "replaced": written.replaced,
            "runs": [str(run.path) for run in sources.runs],
            "passed_over": [str(path) for path in sources.passed_over],
        }
    )

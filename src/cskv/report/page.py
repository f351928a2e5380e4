"""One self-contained HTML page: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from cskv.errors import CSKVError
from cskv.evaluation.pooling import pool
from cskv.files import write_text
from cskv.plots.series import method_names
from cskv.report.figures import draw_sections
from cskv.report.sources import Sources, newest_rows
from cskv.report.summary import summarise, write_csv
from cskv.report.text import budget_text, date_text

if TYPE_CHECKING:
    from jinja2 import Template

PAGE, TABLE = "index.html", "summary.csv"


@dataclass(frozen=True)
class Report:
    """The files of a report, and how much went into it.

    Attributes:
        page, table: the HTML page and the CSV file.
        figures: PNG files.
        rows: result rows that count.
        replaced: rows that a newer run has as well, and which do not.
    """

    page: Path
    table: Path
    figures: list[Path]
    rows: int
    replaced: int


def check_installed() -> None:
    """Find out early whether a report can be made.

    Raises:
        CSKVError: matplotlib or jinja2 is missing.
    """
    try:
        import jinja2  # noqa: F401 (only whether it is there)
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CSKVError(f"a report needs {error.name}: pip install 'cskv[plots]'") from error


def write_report(sources: Sources, folder: str | Path, title: str | None = None) -> Report:
    """Write the page, its figures and the table into a folder; files of an earlier report are replaced, one by one.

    Args:
        sources: from `gather`.
        folder: is made if there is none.
        title: of the page; the model's name when None.

    Raises:
        DataError: a row lacks a figure that its task has.
        CSKVError: matplotlib or jinja2 is missing, or the folder cannot be written.
    """
    check_installed()
    folder = Path(folder)
    rows, replaced = newest_rows(sources.runs)
    points = pool(rows)
    figures = draw_sections(points, sources.spectra, folder)
    write_text(folder / TABLE, write_csv(points))
    model = sources.runs[-1].model
    page = _template().render(
        title=title or f"KV-cache compression of {model.get('name') or 'a model'}",
        model=model,
        methods=method_names(points),
        tasks=list(dict.fromkeys(point.task for point in points)),
        seeds=sorted({seed for point in points for seed in point.seeds}),
        figures=figures,
        table=summarise(points),
        table_file=TABLE,
        replaced=replaced,
        passed_over=[path.name for path in sources.passed_over],
        runs=reversed(sources.runs),
    )
    write_text(folder / PAGE, page)
    drawn = [figure.path for section in figures.values() for figure in section]
    return Report(folder / PAGE, folder / TABLE, drawn, len(rows), sum(entry.count for entry in replaced))


def _template() -> Template:
    """Load the page's template; whatever comes from files is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"budget": budget_text, "value": _value_text, "date": date_text}
    return environment.from_string(files("cskv.report").joinpath("template.html").read_text(encoding="utf-8"))


def _value_text(value: object) -> str:
    """Write a setting for a person: plain text and numbers as they are, anything else as JSON."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping) and not any(isinstance(part, (Mapping, list)) for part in value.values()):
        return ", ".join(f"{name}: {_value_text(part)}" for name, part in value.items())
    if isinstance(value, list) and not any(isinstance(part, (Mapping, list)) for part in value):
        return ", ".join(map(_value_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

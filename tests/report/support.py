"""A small report's results, and a browser to open its page with."""

from __future__ import annotations

import shutil
from pathlib import Path

from cskv.evaluation.results import Run
from tests.plots.made_up import make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def small_run(path: Path, methods: tuple[str, ...] = ("PCA", "SnapKV"), **environment: object) -> Run:
    """A written run of two budgets and two seeds."""
    run = make_run(path, methods, (0.2, 0.1), (0, 1), **environment)
    run.save()
    return run


def browser() -> str | None:
    """The path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)

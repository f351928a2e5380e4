"""Progress of a run of stages: a bar with the time left where a person sees it, else a line per stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from cskv.cli.common import console, progress, say


class Stages:
    """Hears what is being done, stage after stage. A context manager: leaving it ends the last stage.

    Args:
        weights: of the stages, in order: about how much work each is, in any unit. The time left follows from them.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        share = len(weights) / (sum(weights) or 1.0)
        self._weights = [share * weight for weight in weights]  # of a stage on average 1, which the bar counts to
        self._bar = progress() if console().is_terminal else None
        self._scope = ExitStack()
        self._name, self._index, self._done = "", -1, 0.0  # of the stage under way
        self._began = self._stage_began = time.monotonic()

    def __enter__(self) -> Stages:
        if self._bar is not None:
            self._scope.enter_context(self._bar)
            self._line = self._bar.add_task("", total=len(self._weights))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._end()
        self._scope.close()

    def __call__(self, name: str, share: float) -> None:
        """Hear of work.

        Args:
            name: of the stage. Another one than before begins the next stage, and so does work after a whole one.
            share: of the stage that has just been done, from 0 to 1.
        """
        if name != self._name or self._done > 1 - 1e-6:
            self._end()
            self._name, self._done = name, 0.0
            self._index = min(self._index + 1, len(self._weights) - 1)
        self._done += share
        if self._bar is not None:
            self._bar.update(self._line, description=name, completed=self._before(self._done))

    def _before(self, share: float) -> float:
        """Return the work that is done, when so much of the stage is."""
        return sum(self._weights[: self._index]) + min(share, 1.0) * self._weights[self._index]

    def _end(self) -> None:
        """Say how long the stage took."""
        now = time.monotonic()
        if self._index >= 0 and self._bar is None:
            done, total = self._before(1.0), len(self._weights)
            left = duration_text((now - self._began) * (total - done) / max(done, 1e-9))
            rest = f", about {left} left" if self._index + 1 < total else ""
            say(f"{self._name}: {now - self._stage_began:.1f} s ({self._index + 1} of {total}{rest})")
        elif self._index >= 0 and self._bar is not None:
            self._bar.update(self._line, completed=self._before(1.0))
        self._stage_began = now


def duration_text(seconds: float) -> str:
    """Write a duration for a person, in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Progress of a run: a line per stage without a terminal, and a bar whose time left goes by the work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cskv.cli import common, stages
from cskv.cli.stages import Stages, duration_text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(stages, "time", made)
    return made


def test_without_a_terminal_every_stage_is_a_line_with_its_seconds(clock, capsys):
    with Stages([10, 10, 80]) as told:
        for name, seconds in (("a", 5.0), ("b", 15.0), ("b", 100.0)):  # two seeds of the same
            told(name, 0.5)
            clock.now += seconds
            told(name, 0.5)
    assert capsys.readouterr().err.splitlines() == [
        "a: 5.0 s (1 of 3, about 45 s left)",
        "b: 15.0 s (2 of 3, about 80 s left)",
        "b: 100.0 s (3 of 3)",
    ]


def test_what_is_broken_off_is_no_stage(clock, capsys):
    with pytest.raises(ValueError, match="stop"), Stages([1, 1]) as told:
        told("a", 0.5)
        raise ValueError("stop")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    for module in (common, stages):
        monkeypatch.setattr(module, "console", lambda: terminal)
    with Stages([1, 3]) as told:
        told("first", 1.0)
        assert told._bar.tasks[0].completed == pytest.approx(0.5)  # a quarter of the work
        told("second", 0.5)
        assert told._bar.tasks[0].completed == pytest.approx(0.5 + 0.75)
        assert told._bar.tasks[0].time_remaining is not None
    assert told._bar.tasks[0].completed == pytest.approx(2.0)
    assert "second" in screen.getvalue()


def test_durations_are_written_as_people_write_them():
    assert [duration_text(seconds) for seconds in (0.4, 89, 600, 9000)] == ["0 s", "89 s", "10 min", "2.5 h"]

"""Ctrl-C and SIGTERM during training: finish the step, save, and only then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside the block a first signal is only noted; a second one acts at once.

    Handlers belong to the main thread; elsewhere signals keep their meaning and nothing is ever noted.

    Attributes:
        signal: the signal noted, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        self._restore()

    def deliver(self) -> None:
        """Hand the noted signal to whoever handled it before: KeyboardInterrupt, or the end of the process."""
        self._restore()
        if self.signal is not None:
            signal.raise_signal(self.signal)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        else:
            self.deliver()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

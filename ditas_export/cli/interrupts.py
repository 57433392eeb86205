"""Ctrl-C and SIGTERM while a command works: the stack unwinds, so that what is kept is whole."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ditas_export.cli.first_signals import EXIT_INTERRUPTED

SAME_WISH_S = 2.0
"""Signals within this time are one wish: torchrun sends its ranks one, and the terminal another."""


@dataclass(slots=True)
class Interruption:
    """Whether a signal asked to stop, and which."""

    number: int | None = None
    at: float = -SAME_WISH_S

    @property
    def exit_code(self) -> int:
        """Return what a shell expects of a process that a signal has ended."""
        return EXIT_INTERRUPTED if self.number is None else 128 + self.number

    def arrive(self, number: int, _frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, once for signals that come together."""
        now = time.monotonic()
        if now - self.at >= SAME_WISH_S:
            self.number, self.at = number, now
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Raise KeyboardInterrupt inside where SIGINT or SIGTERM arrives, unless it is ignored.

    Signals are the main thread's alone; in another this does nothing.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        for number in before:
            signal.signal(number, interruption.arrive)
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""SIGINT and SIGTERM while training: noted, so that the step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedNow(BaseException):
    """A signal came while nothing was changed that is worth waiting for."""


class Interruption:
    """Whether a signal has asked training to end.

    Attributes:
        number: The signal; 0: none has.
    """

    def __init__(self) -> None:
        self.number = 0
        self._raises = False

    def note(self, number: int) -> None:
        """Remember a signal."""
        self.number = number
        if self._raises:
            raise InterruptedNow

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this context a signal is not waited with, and raises ``InterruptedNow``."""
        self._raises = True
        try:
            if self.number:
                raise InterruptedNow
            yield
        finally:
            self._raises = False


@contextmanager
def noted_signals() -> Iterator[Interruption]:
    """Note the first signal instead of what it does otherwise; a second one does just that.

    Outside the main thread signals are left alone, as is one that is ignored.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    noted = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]

    def restore() -> None:
        for number in noted:
            signal.signal(number, before[number])

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        interruption.note(number)

    try:
        for number in noted:
            signal.signal(number, note)
        yield interruption
    finally:
        restore()

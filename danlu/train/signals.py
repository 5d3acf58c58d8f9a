"""SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop; a second SIGINT stops it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Asked:
    """Holds the signal that asked the run to stop, or 0."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            os._exit(130)                               # asked twice: no more politeness, the last checkpoint is whole
        self.signal = number


@contextmanager
def listening() -> Iterator[Asked]:
    """Yield an `Asked` that the signals fill; the handlers before are put back at the end."""
    asked = Asked()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

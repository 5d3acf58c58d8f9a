"""When those who are refused should come again: after about as long as it takes to answer all who are about."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

LEAST, MOST = 1, 30                                      # seconds
SLOWEST = 0.1                                            # answers a second, where none were seen yet
MEMORY = 10.0                                            # seconds after which what happened counts half
TRIES = 2                                                # that all who are about make in that time, so that no place stays empty


class Again:
    """Counts answers and refusals.  Whoever is refused comes again after what was told him, so that as many are outside as
    were refused in that time; so many answers take so long.  A few seconds too early is better: then one of them finds the
    place that the one before left.  Not for several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.last = clock, clock()
        self.answers = self.refusals = self.told = 0.0   # told: sum of the seconds that were told

    def _fade(self) -> None:
        now = self.clock()
        keep = 0.5 ** ((now - self.last) / MEMORY)
        self.last = now
        self.answers, self.refusals, self.told = self.answers * keep, self.refusals * keep, self.told * keep

    def answered(self) -> None:
        """Note that a request was answered."""
        self._fade()
        self.answers += 1

    def refused(self) -> int:
        """Note that a request is refused; return after how many seconds it should come again."""
        self._fade()
        rate = math.log(2) / MEMORY                      # so that the faded counts are events a second
        mean = self.told / self.refusals if self.refusals else LEAST
        self.refusals += 1
        outside = self.refusals * rate * mean
        seconds = min(MOST, max(LEAST, math.ceil(outside / TRIES / max(self.answers * rate, SLOWEST))))
        self.told += seconds
        return seconds

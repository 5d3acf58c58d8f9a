"""What a model's steps take, learned from the steps: how long an answer takes alone, and how long beside others.

Seconds of a step = passes through the model × a + texts written × b + tokens of prompts × c.  a, b and c are fitted to the
latest steps by least squares, so that both times are of this machine as it is now.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KEPT = 0.995                                            # what a step still counts after the next one
KNOWN = 8                                               # steps before anything is foretold
WILD = 4.0                                              # times of what was expected; more counts as no more
SCALE = np.array([1.0, 0.5, 1 / 64])                    # until steps differ, most of their time is taken for that of the pass


class Work(NamedTuple):
    """A text: prompt tokens that are not yet read, and tokens that it may still write."""

    read: int
    write: int
    adapter: str | None = None


class Pace:
    """Fitted seconds.  Of one thread that sees and any that ask: an answer may be a step late, which does no harm."""

    def __init__(self) -> None:
        self.products, self.sums, self.seen = np.zeros((3, 3)), np.zeros(3), 0
        self.fit = np.zeros(3)

    def saw(self, passes: int, texts: int, tokens: int, seconds: float) -> None:
        """Learn from a step."""
        x = np.array([passes, texts, tokens]) * SCALE
        if self.seen >= KNOWN:
            seconds = min(seconds, WILD * max(float(x @ self.fit), 1e-6))
        self.products = KEPT * self.products + np.outer(x, x)
        self.sums = KEPT * self.sums + x * seconds
        self.seen += 1
        ridge = 1e-3 * np.trace(self.products) / 3 * np.eye(3)
        before = ridge @ self.fit if self.seen > KNOWN else 0.0          # what these steps do not tell stays as it was
        found: np.ndarray = np.linalg.solve(self.products + ridge, self.sums + before)
        some = found > 0
        if not some.all():                              # noise; time is no less for more work
            found = np.zeros(3)
            found[some] = np.maximum(np.linalg.solve((self.products + ridge)[np.ix_(some, some)], self.sums[some]), 0)
        self.fit = found

    @property
    def known(self) -> bool:
        """Whether enough steps were seen."""
        return self.seen >= KNOWN

    def of(self, passes: float, texts: float, tokens: float) -> float:
        """Return the seconds of so much."""
        return float(np.array([passes, texts, tokens]) * SCALE @ self.fit)

    def alone(self, work: Work) -> float:
        """Return the seconds of a text that has the model for itself."""
        return self.of(1, 0, work.read) + self.of(work.write, work.write, 0)

    def beside(self, work: Work, running: Sequence[Work], waiting: Sequence[Work], slots: int) -> float:
        """Return the seconds until a text is done that joins these, waits for its turn among them, and shares its steps.

        Every place is taken again as soon as it is free: a server that is asked for more has that before it.
        """
        others = [*running, *waiting]
        ends = [one.write for one in running][:slots] + [0] * (slots - len(running))
        heapq.heapify(ends)
        for one in waiting:
            heapq.heappush(ends, heapq.heappop(ends) + one.write)
        steps = ends[0] + work.write
        share = min(1.0, (slots - 1) / max(1, len(others)))
        passes = len({one.adapter for one in (*others, work)})
        joining = share * math.fsum(self.of(1, 0, one.read) / max(1, one.write) for one in others)
        return steps * (self.of(passes, 1 + share * len(others), 0) + joining) + self.of(1, 0, work.read)

"""Rows of tasks that wait at the same time are computed together.

Every request is due when the server's patience with it ends; who is due first is computed first, and who could be answered in
time only at the cost of those who wait already is refused.  So short ones pass long ones, and nobody who was let in waits much
longer for it.  There is no artificial delay: while one batch is computed, the next gathers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from danlu.decode import Pace, Patience
from danlu.errors import ResourceError
from danlu.evaluate import rows
from danlu.evaluate.lines import Line
from danlu.evaluate.tell import Said
from danlu.serve.again import Again
from danlu.serve.limits import Refused, busy
from danlu.serve.meters import Meters
from danlu.words import _

Result = TypeVar("Result")
USUAL, FRESH = 0.25, 0.1                                 # tokens of a character at first; share of what is new in their average
TOGETHER = 32                                            # rows of a batch: those behind it wait no longer than for so many


class _Waiting:
    """A request: the lines that are not yet computed, and what was said of the others."""

    def __init__(self, task: rows.Task, lines: Sequence[Line], done: asyncio.Future[list[list[Said]]],
                 loop: asyncio.AbstractEventLoop) -> None:
        self.task, self.done, self.loop, self.due = task, done, loop, 0.0
        self.left = deque(enumerate(lines))
        self.said: list[list[Said] | None] = [None] * len(lines)
        self.missing = len(lines)
        self.tokens = _tokens(lines) / max(1, len(lines))            # of a line
        self.gone = False


@dataclass(eq=False)
class Read:
    """A request whose texts are read: its rows, the tokens that one of them should have, and when it is due."""

    rows: int
    tokens: float
    due: float
    found: int = 0                                       # tokens of all, once they are known


class _Job:
    """Work that no batch may run beside."""

    def __init__(self, work: Callable[[], Any], done: asyncio.Future[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.work, self.done, self.loop, self.gone = work, done, loop, False

    def run(self) -> None:
        if self.gone:
            return
        try:
            found, problem = self.work(), None
        except Exception as error:                       # the thread outlives it
            found, problem = None, error

        def tell() -> None:
            if self.done.done():
                return
            if problem is not None:
                self.done.set_exception(problem)
            else:
                self.done.set_result(found)

        self.loop.call_soon_threadsafe(tell)


def _tokens(lines: Iterable[Line]) -> int:
    """Return the tokens of lines."""
    return sum(len(row["ids"]) for line in lines for row in line.rows)


class Gather:
    """One thread that computes rows for all who ask."""

    def __init__(self, *, most: int, meters: Meters, patience: Patience) -> None:
        self.most, self.meters, self.patience = most, meters, patience
        self.pace, self.again = Pace(), Again()
        self.until = 0.0                                 # when the batch that is computed should be done
        self.waiting: list[_Waiting] = []
        self.read: list[Read] = []
        self.share = USUAL                               # tokens of a character, as seen lately
        self.jobs: deque[_Job] = deque()
        self.count, self.closed = 0, False
        self.ready = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="danlu-rows", daemon=True)
        self.thread.start()

    async def said(self, task: rows.Task, lines: Sequence[Line], *, read: Read | None = None) -> list[list[Said]]:
        """Return what the task's head gives for each row of each line.  Raises Refused if too many wait, or it would take long.

        read: what `reading` gave; its time has begun there.  If the caller is cancelled, what is not yet computed never is.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(task, lines, loop.create_future(), loop)
        with self.ready:
            if self.closed or self.count + len(lines) > self.most:
                raise busy(_("{n} rows wait already; come again later").format(n=self.count), retry=self.again.refused())
            one.due = self._due(len(lines), one.tokens) if read is None else read.due
            if not self._soon(len(lines), one.tokens, one.due):
                raise self._late()
            self.waiting.append(one)
            self.count += len(lines)
            self.meters.waiting.set(self.count)
            self.ready.notify()
        try:
            found = await one.done
            self.again.answered()
            return found
        finally:
            one.gone = True

    async def alone(self, work: Callable[[], Result]) -> Result:
        """Return what `work` gives, done between two batches: nothing else goes through a task's model meanwhile.

        Raises Refused if such work is waiting already.  If the caller is cancelled before it began, it never does.
        """
        loop = asyncio.get_running_loop()
        job = _Job(work, loop.create_future(), loop)
        with self.ready:
            if self.closed or self.jobs:
                raise busy(_("another text is being explained; come again later"))
            self.jobs.append(job)
            self.ready.notify()
        try:
            found: Result = await job.done
            return found
        finally:
            job.gone = True

    @contextmanager
    def reading(self, rows: int, characters: int) -> Iterator[Read]:
        """Let the texts of a request be read; the caller leaves the number of their tokens in what it is given.

        Raises Refused, before anything is read, if they would take long by the number of their characters: who was refused only
        afterwards would make all others wait for the reading.
        """
        each = self.share * characters / max(1, rows)
        place = Read(rows, each, self._due(rows, each))
        with self.ready:
            if not self._soon(rows, each, place.due, read=self.read):
                raise self._late()
            self.read.append(place)
        try:
            yield place
            self.share += FRESH * (place.found / max(1, characters) - self.share)
        finally:
            with self.ready:
                self.read.remove(place)

    def _late(self) -> Refused:
        return busy(_("the rows would take much longer than they do alone; come again later"), retry=self.again.refused())

    def _due(self, mine: int, each: float) -> float:
        """Return until when a request of so many rows and tokens a row is to be done."""
        return time.perf_counter() + self.patience.grants(self.pace.of(-(-mine // TOGETHER), mine, mine * each))

    def _soon(self, mine: int, each: float, due: float, *, read: Sequence[Read] = ()) -> bool:
        """Return whether a request is done in time, and those who are due after it as well.

        each: tokens of one of its rows; read: those whose texts are read, who wait soon.
        """
        others = [(one.due, len(one.left), one.tokens) for one in self.waiting if not one.gone]
        others += [(one.due, one.rows, one.tokens) for one in read]
        now = time.perf_counter()
        at = max(now, self.until)
        if not self.pace.known or (not others and at == now):
            return True
        rows, tokens = 0, 0.0
        for until, count, size in sorted([*others, (due, mine, each)]):
            rows, tokens = rows + count, tokens + count * size
            if until >= due and at + self.pace.of(-(-rows // TOGETHER), rows, tokens) > until:
                return False
        return True

    def close(self) -> None:
        """End the thread after the batch that it computes."""
        with self.ready:
            self.closed = True
            self.ready.notify()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.ready:
                while not self.waiting and not self.jobs and not self.closed:
                    self.ready.wait()
                if self.closed:
                    return
                batch, job = self._next(), self.jobs.popleft() if self.jobs else None
            if job is not None:
                job.run()
            if batch:
                self.meters.batch.observe(len(batch))
                lines, began = [line for _one, _number, line in batch], time.perf_counter()
                tokens = _tokens(lines)
                self.until = began + self.pace.of(1, len(lines), tokens)
                self._compute(batch)
                self.pace.saw(1, len(lines), tokens, time.perf_counter() - began)
                self.until = 0.0

    def _next(self) -> list[tuple[_Waiting, int, Line]]:
        """Take lines of those that ask for the same as who is due first, in the order in which they are due."""
        batch: list[tuple[_Waiting, int, Line]] = []
        for one in [one for one in self.waiting if one.gone]:
            self.waiting.remove(one)
            self.count -= len(one.left)
        ordered = sorted(self.waiting, key=lambda one: one.due)
        for one in [one for one in ordered if one.task is ordered[0].task]:
            while one.left and len(batch) < TOGETHER:
                batch.append((one, *one.left.popleft()))
            if not one.left:
                self.waiting.remove(one)
        self.count -= len(batch)
        self.meters.waiting.set(self.count)
        return batch

    def _compute(self, batch: list[tuple[_Waiting, int, Line]]) -> None:
        try:
            with torch.inference_mode():
                found = [said for _line, said in rows.answered(batch[0][0].task, [line for _one, _number, line in batch])]
        except Exception as error:                       # the thread outlives a batch that cannot be computed
            problem = ResourceError(str(error)) if isinstance(error, MemoryError) else error
            for one in {id(one): one for one, _number, _line in batch}.values():
                self._end(one, problem)
            return
        for (one, number, _line), said in zip(batch, found, strict=True):
            one.said[number] = said
            one.missing -= 1
            if not one.missing:
                self._end(one, None)

    def _end(self, one: _Waiting, problem: Exception | None) -> None:
        one.gone = True

        def tell() -> None:
            if one.done.done():
                return
            if problem is not None:
                one.done.set_exception(problem)
            else:
                said: Any = one.said
                one.done.set_result(said)

        one.loop.call_soon_threadsafe(tell)

"""Rows of tasks that wait at the same time are computed together, a fair share of each request in every batch.

There is no artificial delay: while one batch is computed, the next gathers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

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
TOGETHER = 64                                            # rows of a batch: those behind it wait no longer than for so many


class _Waiting:
    """A request: the lines that are not yet computed, and what was said of the others."""

    def __init__(self, task: rows.Task, lines: Sequence[Line], done: asyncio.Future[list[list[Said]]],
                 loop: asyncio.AbstractEventLoop) -> None:
        self.task, self.done, self.loop = task, done, loop
        self.left = deque(enumerate(lines))
        self.said: list[list[Said] | None] = [None] * len(lines)
        self.missing = len(lines)
        self.tokens = _tokens(lines) / max(1, len(lines))            # of a line
        self.gone = False


class _Read(NamedTuple):
    """A request whose texts are read: its rows, and the tokens that one of them should have."""

    rows: int
    tokens: float


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
        self.waiting: deque[_Waiting] = deque()
        self.read: list[_Read] = []
        self.share = USUAL                               # tokens of a character, as seen lately
        self.jobs: deque[_Job] = deque()
        self.count, self.closed = 0, False
        self.ready = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="danlu-rows", daemon=True)
        self.thread.start()

    async def said(self, task: rows.Task, lines: Sequence[Line]) -> list[list[Said]]:
        """Return what the task's head gives for each row of each line.  Raises Refused if too many wait, or it would take long.

        If the caller is cancelled, what is not yet computed never is.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(task, lines, loop.create_future(), loop)
        with self.ready:
            if self.closed or self.count + len(lines) > self.most:
                raise busy(_("{n} rows wait already; come again later").format(n=self.count), retry=self.again.refused())
            if not self._soon(len(lines), one.tokens):
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
    def reading(self, rows: int, characters: int) -> Iterator[list[int]]:
        """Let the texts of a request be read; the caller leaves the number of their tokens in what it is given.

        Raises Refused, before anything is read, if they would take long by the number of their characters: who was refused only
        afterwards would make all others wait for the reading.
        """
        place, tokens = _Read(rows, self.share * characters / max(1, rows)), list[int]()
        with self.ready:
            if not self._soon(rows, place.tokens, read=self.read):
                raise self._late()
            self.read.append(place)
        try:
            yield tokens
            self.share += FRESH * (sum(tokens) / max(1, characters) - self.share)
        finally:
            with self.ready:
                self.read.remove(place)

    def _late(self) -> Refused:
        return busy(_("the rows would take much longer than they do alone; come again later"), retry=self.again.refused())

    def _soon(self, mine: int, each: float, *, read: Sequence[_Read] = ()) -> bool:
        """Return whether a request is done in time: after the batch under way, and with its share of those who wait.

        each: tokens of one of its rows; read: those whose texts are read, who wait soon.
        """
        own = mine * each
        others = [(min(len(one.left), mine), one.tokens) for one in self.waiting if not one.gone]
        others += [(min(one.rows, mine), one.tokens) for one in read]
        left = self.until - time.perf_counter()
        if not others and left <= 0:
            return True
        rows = mine + sum(count for count, _size in others)
        tokens = own + sum(count * size for count, size in others)
        alone = self.pace.of(-(-mine // TOGETHER), mine, own)
        return self.patience.lets(self.pace, alone, max(0.0, left) + self.pace.of(-(-rows // TOGETHER), rows, tokens))

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
        """Take a line of each request in turn, of those that ask for the same as the first."""
        batch: list[tuple[_Waiting, int, Line]] = []
        for one in [one for one in self.waiting if one.gone]:
            self.waiting.remove(one)
            self.count -= len(one.left)
        mine = [one for one in self.waiting if one.task is self.waiting[0].task] if self.waiting else []
        while mine and len(batch) < TOGETHER:
            for one in list(mine):
                number, line = one.left.popleft()
                batch.append((one, number, line))
                if not one.left:
                    mine.remove(one)
                    self.waiting.remove(one)
                if len(batch) == TOGETHER:
                    break
        if self.waiting:
            self.waiting.rotate(-1)                      # a long request, or another task, lets the next one be first
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

"""Worker processes that give their answers in the order of the questions, and are replaced when they die.

Each worker is a fresh interpreter at the other end of a socket pair: no fork, and the caller's `__main__` is not
imported, so that a script needs no guard.  It holds at most two questions: one that it works on, one that waits.  Only
`ahead` questions are open at a time, so memory is bounded whatever the length of the stream.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from danlu import fault
from danlu.errors import DanluError, DataError
from danlu.words import _

Q = TypeVar("Q")
A = TypeVar("A")
TRIES = 3                                           # deaths over one question before it is given up
PATIENCE = 900.0                                    # seconds without any answer before the workers are taken for dead
START = ("import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
         "from danlu.data.pool import serve; serve(int(sys.argv[1]))")


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    link: Connection
    open: deque[int] = field(default_factory=deque)             # numbers of its questions, oldest first


def ordered(questions: Iterable[Q], work: Callable[[Q], A], *, workers: int, name: Callable[[Q], str],
            patience: float = PATIENCE) -> Iterator[A]:
    """Yield `work(question)` for each question, in order, computed in `workers` processes (0: in this one).

    `work` is an object of an importable class; it and the questions are copied to the processes.  An error of `work` is
    raised here.  A process that dies is replaced; if one question kills three, DataError names it.
    """
    if workers == 0:
        yield from map(work, questions)
        return
    pool = _Pool(work, name, patience)
    try:
        for _number in range(workers):
            pool.start()
        yield from pool.run(iter(questions), ahead=4 * workers)
    finally:
        pool.stop()


class _Pool:
    def __init__(self, work: Callable[[Any], Any], name: Callable[[Any], str], patience: float) -> None:
        self.work, self.name, self.patience = work, name, patience
        self.workers: list[_Worker] = []
        self.questions: dict[int, Any] = {}                     # open ones, by number
        self.answers: dict[int, Any] = {}                       # those that wait for their turn
        self.waiting: deque[int] = deque()                      # not sent yet
        self.deaths: dict[int, int] = {}

    def start(self) -> None:
        """Start one more worker."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(self.patience) + 1, 0))
        with theirs:
            process = subprocess.Popen([sys.executable, "-c", START, str(theirs.fileno()), json.dumps(sys.path)],
                                       pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        worker = _Worker(process, Connection(ours.detach()))
        self.workers.append(worker)
        self._send(worker, (fault.armed(), self.work))

    def run(self, questions: Iterator[Any], ahead: int) -> Iterator[Any]:
        """Yield the answers in order."""
        asked = due = 0
        more = True
        while more or due < asked:
            while more and asked - due < ahead:
                question = next(questions, self)
                more = question is not self
                if more:
                    self.questions[asked] = question
                    self.waiting.append(asked)
                    asked += 1
                    self._hand_out()
            if due in self.answers:
                yield self.answers.pop(due)
                due += 1
            elif due < asked:
                self._hear()

    def _hand_out(self) -> None:
        for room in (1, 2):                                     # first an idle worker, then one with a free place
            for worker in list(self.workers):
                while self.waiting and len(worker.open) < room:
                    number = self.waiting.popleft()
                    worker.open.append(number)
                    self._send(worker, self.questions[number])

    def _send(self, worker: _Worker, message: Any) -> None:
        try:
            worker.link.send(message)
        except OSError:                                         # it died, or stands still: `_hear` replaces it
            worker.process.kill()

    def _hear(self) -> None:
        ready = wait([worker.link for worker in self.workers], self.patience)
        for worker in [w for w in self.workers if (w.link in ready if ready else w.open)]:
            try:
                if not ready:
                    raise EOFError
                failed, answer = worker.link.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            if failed:
                raise answer
            number = worker.open.popleft()
            self.answers[number] = answer
            del self.questions[number]
            self.deaths.pop(number, None)
        self._hand_out()

    def _replace(self, worker: _Worker) -> None:
        """Start another worker instead of a dead one; its questions are asked again, the first of them on probation."""
        self.workers.remove(worker)
        code = _end(worker)
        suspect = worker.open[0] if worker.open else -1
        self.deaths[suspect] = self.deaths.get(suspect, 0) + 1
        if self.deaths[suspect] >= TRIES:
            place = self.name(self.questions[suspect]) if suspect in self.questions else None
            raise DataError(_("a worker process died {n} times over the same rows (exit {code})").format(
                n=TRIES, code=code), where=place,
                fix=_("use workers: 0 to see why, or fewer workers if memory ran out"))
        self.waiting.extendleft(reversed(worker.open))
        self.start()

    def stop(self) -> None:
        """End every worker; none outlives this."""
        for worker in self.workers:
            _end(worker)
        self.workers.clear()


def _end(worker: _Worker) -> int:
    worker.link.close()
    worker.process.kill()
    return worker.process.wait()


def serve(handle: int) -> None:
    """Answer the questions that come over `handle` until it is closed.  Runs in the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is for the parent, which then closes the link
    os.environ["TOKENIZERS_PARALLELISM"] = "false"              # one process, one core
    link = Connection(handle)
    try:
        armed, work = link.recv()
    except (EOFError, ConnectionResetError):
        return
    fault.arm(armed)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(link, inbox), daemon=True).start()
    while (message := inbox.get()) is not None:
        fault.fault("data.worker")
        try:
            answer = (False, work(message[0]))
        except DanluError as error:
            answer = (True, error)
        try:
            link.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


def _receive(link: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Take messages off the link at once, so that the parent never waits while it sends."""
    try:
        while True:
            inbox.put((link.recv(),))
    except (EOFError, OSError):
        inbox.put(None)

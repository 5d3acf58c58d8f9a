"""Saves that training does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from danlu.fault import fault
from danlu.train.checkpoint import Snapshot, save
from danlu.train.shards import Crew


class Writer:
    """Saves in a thread of its own.  A failure is told at the next step; the run goes on without that save.

    group: the processes that save together.  A failure of one is the failure of all.
    """

    def __init__(self, out: Path, *, done: Callable[[Path], None], group: dist.ProcessGroup | None = None) -> None:
        self.out, self.done, self.group = out, done, group
        self.thread: threading.Thread | None = None
        self.alive: Callable[[], None] = lambda: None
        self.spare: Snapshot | None = None
        self.error: BaseException | None = None
        self.failures = 0

    def submit(self, snap: Snapshot, *, wait: bool = False) -> None:
        """Begin to write `snap` once the save before it has ended; `wait` returns when it is on disk."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(snap,), name="danlu-checkpoint")
        self.thread.start()
        if wait:
            self.wait()

    def _run(self, snap: Snapshot) -> None:
        try:
            crew = Crew(self.group)
            crew.all(lambda: fault("ckpt.async"))
            path = save(self.out, snap, group=self.group)
            crew.all(lambda: self.done(path))
            self.failures = 0
        except BaseException as error:                   # a thread has nobody to raise to: poll() tells it
            self.error = error
            self.failures += 1
        self.spare = snap

    def wait(self) -> None:
        """Return when no save is under way; `alive` is called every second until then."""
        if self.thread is not None:
            while self.thread.is_alive():
                self.thread.join(1.0)
                self.alive()
            self.thread = None

    def poll(self) -> BaseException | None:
        """Return the error of a save that failed since the last call."""
        error, self.error = self.error, None
        return error

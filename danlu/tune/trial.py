"""One trial: `danlu train` in a process of its own, watched through its metrics, ended when it is not worth going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from danlu import files
from danlu.train.signals import Asked

POLL = 0.1                                               # seconds between two looks at the metrics
GRACE = 60.0                                             # seconds to save after SIGTERM
LOG = "train.log"                                        # what the trial said


class Ended(NamedTuple):
    """How a trial ended: its exit code, whether we stopped it for its values, and the last line it said."""

    code: int
    pruned: bool
    last: str


def name(number: int) -> str:
    """Return the folder of trial `number`."""
    return f"trial-{number:04d}"


def run(words: list[str], folder: Path, *, hopeless: Callable[[], bool], asked: Asked) -> Ended:
    """Train as `words` say, in another process, until it ends, a signal asks this one to stop, or `hopeless()` is true.

    The process dies with this one, whatever kills it; its metrics are looked at once more after its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "danlu", "train", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | {"DANLU_SUPERVISOR": str(os.getpid())}, start_new_session=True)
        pruned = False
        try:
            while process.poll() is None and not asked.signal and not pruned:
                time.sleep(POLL)
                pruned = hopeless()
        finally:
            code = end(process)
    pruned = pruned or (code == 0 and hopeless())
    return Ended(code, pruned, last_line(folder / LOG))


def end(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a process that is over, after asking it to be."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    code = process.wait()
    return code if code >= 0 else 128 - code


def last_line(log: Path) -> str:
    """Return the last line that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Tail:
    """The evaluations of a run so far, each given once."""

    def __init__(self, folder: Path, metric: str, *, after: int) -> None:
        self.path, self.metric, self.step = folder / "metrics.jsonl", metric, after
        self.size = -1
        self.names: set[str] = set()                     # of all metrics seen, to say what there is

    def new(self) -> Iterator[tuple[int, float]]:
        """Yield (step, value) of evaluations that were not given yet; the one before the first step never is."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size == self.size:
            return
        self.size = size
        for line in files.read_lines(self.path):
            self.names |= {key for key in line if key.startswith("eval/") and not key.endswith("_hex")}
            if self.metric in line and line["step"] > max(0, self.step):
                self.step = line["step"]
                yield line["step"], float(line[self.metric])

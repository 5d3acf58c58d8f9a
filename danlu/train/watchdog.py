"""A thread that ends a process which has stopped to make steps, and says which rank is at fault.

Every rank's thread writes how far its training thread is to heartbeat/rank-N.json in the run folder: files, because the
store of a process group lives in rank 0, which may be the one that hangs.  When nothing moves any more, a rank writes its
stacks to stacks/rank-N.txt, looks who does not write, or who is behind, and exits with 75: the supervisor starts again.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Protocol

from danlu.errors import TemporaryError
from danlu.log import duration
from danlu.words import _

Beats = Mapping[int, Mapping[str, Any]]                  # rank -> what it has written last


class Ranks(Protocol):
    """What is asked of a world."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


class Watchdog:
    """Ends the process when no beat has come for `seconds`; `first` is the limit for the first one (default: 3 × seconds).

    The first beat should come after the first step: compilation lies before it.  Whatever may last longer than `seconds`
    (evaluation, a save that is waited for) has to beat on the way.  `seconds` of 0 switches it off.
    """

    def __init__(self, folder: Path, seconds: float, world: Ranks, *, first: float | None = None,
                 end: Callable[[int], object] = os._exit) -> None:
        self.folder, self.seconds, self.world, self.end = folder, seconds, world, end
        self.first = 3 * seconds if first is None else first
        self.period = min(15.0, seconds / 10)
        self.step, self.phase, self.beats = -1, "", 0
        self.last, self.when = time.monotonic(), time.time()
        self.trainer = threading.get_ident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="danlu-watchdog", daemon=True)
        self.stacks: IO[str] | None = None
        self.written = 0

    def beat(self, step: int, phase: str = "step") -> None:
        """Say that the training thread lives, and what it is about to do."""
        self.step, self.phase, self.last, self.when = step, phase, time.monotonic(), time.time()
        self.trainer = threading.get_ident()
        self.beats += 1

    def __enter__(self) -> Watchdog:
        if self.seconds:
            for name in ("heartbeat", "stacks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            if self.world.rank == 0:
                self._sweep()
            self.stacks = self._file("stacks", "txt").open("w", encoding="utf-8")
            self.last = time.monotonic()
            self._write()
            self.thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.over.set()
        if self.stacks is None:
            return
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
        with suppress(OSError):                          # what is left has something to say
            self._file("heartbeat", "json").unlink()
            if not self._file("stacks", "txt").stat().st_size:
                self._file("stacks", "txt").unlink()
            for name in ("heartbeat", "stacks"):
                (self.folder / name).rmdir()

    def _sweep(self) -> None:
        """Remove what killed processes of a larger world left behind; stacks only if nothing was written."""
        for path in self.folder.glob("*/rank-*.*"):
            rank = path.stem.removeprefix("rank-")
            if path.parent.name in ("heartbeat", "stacks") and rank.isdigit() and int(rank) >= self.world.size:
                with suppress(OSError):
                    if path.parent.name == "heartbeat" or not path.stat().st_size:
                        path.unlink()

    def _file(self, kind: str, ending: str) -> Path:
        return self.folder / kind / f"rank-{self.world.rank}.{ending}"

    def _watch(self) -> None:
        assert self.stacks is not None
        while not self.over.wait(self.period):
            limit = self.seconds if self.beats else self.first
            # a second one that needs neither the interpreter nor the disk, should one of them be what hangs
            faulthandler.dump_traceback_later(1.5 * limit + 4 * self.period, exit=True, file=self.stacks)
            self._write()
            if time.monotonic() - self.last > limit and self._hangs():
                break

    def _hangs(self) -> bool:
        """Dump, find the rank at fault, and end the process; return False if the training thread has moved meanwhile."""
        seen = self.beats
        assert self.stacks is not None
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        self.stacks.flush()
        self._write(hangs=True)
        before = read(self.folder)
        if self.over.wait(2.5 * self.period) or self.beats != seen:
            return False
        after = read(self.folder)
        silent, behind = guilty(before, after, self.world.size)
        witnesses = [rank for rank, line in after.items() if line["hangs"] and rank not in silent]
        if self.world.rank == min(witnesses, default=self.world.rank):
            text = _("{what}; stacks are in {folder}; this run ends, to be started again").format(
                what=_told(silent, behind, after, time.monotonic() - self.last), folder=self.folder / "stacks")
            # not by `say`: all but the first rank are silent, and that one may be what hangs
            print(("\r\x1b[2K" if sys.stderr.isatty() else "") + _("danlu: {problem}").format(problem=text), file=sys.stderr,
                  flush=True)
        self.end(TemporaryError.code)
        return True

    def _write(self, *, hangs: bool = False) -> None:
        self.written += 1
        place, waits = _place(sys._current_frames().get(self.trainer)) if hangs else ("", False)
        line = {"rank": self.world.rank, "pid": os.getpid(), "written": self.written, "step": self.step, "phase": self.phase,
                "when": self.when, "hangs": hangs, "place": place, "waits": waits}
        path = self._file("heartbeat", "json")
        temporary = path.with_suffix(".tmp")
        with suppress(OSError):                          # a full disk is no reason to end
            temporary.write_text(json.dumps(line), encoding="utf-8")
            temporary.replace(path)


def read(folder: Path) -> dict[int, dict[str, Any]]:
    """Return what each rank has written last."""
    found = {}
    for path in (folder / "heartbeat").glob("rank-*.json"):
        with suppress(OSError, ValueError, KeyError):    # it may vanish between the two
            line = json.loads(path.read_text(encoding="utf-8"))
            found[int(line["rank"])] = line
    return found


def guilty(before: Beats, after: Beats, size: int) -> tuple[list[int], int]:
    """Return the ranks that have written nothing between two readings (stopped or gone), and the rank that is behind.

    Behind is who has the lowest step; among equals who does not wait for the others inside torch.distributed, then who
    has been silent for longest.
    """
    missing = [rank for rank in range(size) if rank not in after]
    still = [rank for rank, line in after.items()
             if rank < size and not line["hangs"] and rank in before and before[rank]["written"] == line["written"]]
    ranks = [rank for rank in after if rank < size]
    behind = min(ranks, default=0, key=lambda r: (after[r]["step"], after[r]["waits"], after[r]["when"]))
    return sorted({*missing, *still}), behind


def _told(silent: list[int], behind: int, lines: Beats, age: float) -> str:
    """Return what hangs, in words."""
    if silent:
        step = max(lines.get(silent[0], {}).get("step", 0), 0)
        return _("nothing has moved for {time}, and there is no sign of life from rank {ranks} (last heard of at step {step})"
                 ).format(time=duration(age), ranks=", ".join(map(str, silent)), step=step)
    line = lines[behind]
    return _("nothing has moved for {time}: rank {rank} hangs after step {step} ({phase} {place})").format(
        time=duration(age), rank=behind, step=max(line["step"], 0), phase=line["phase"], place=line["place"])


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Return file, line and function of the innermost frame that is ours, and whether it waits in torch.distributed."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename.replace(os.sep, "/"), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    inner = next((file for file, _line, _name in frames if not file.endswith("/torch/_ops.py")), "")
    ours = next(((file, line, name) for file, line, name in frames if "/torch/" not in file), ("", 0, ""))
    return f"{'/'.join(ours[0].split('/')[-2:])}:{ours[1]} {ours[2]}", "/torch/distributed/" in inner

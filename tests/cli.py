"""The command line as tests drive it: in a process of its own, on one thread, with faults planted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line of stderr: what the user is told."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""

    def clean(self) -> Ended:
        """Itself, if no traceback was shown."""
        assert "Traceback" not in self.err, self.err
        return self


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "danlu", *map(str, words)]


MEASURE = """
import atexit, sys
peak, sys.argv = sys.argv[1], ["danlu", *sys.argv[2:]]
def tell():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    open(peak, "w").write(line.split()[1])
atexit.register(tell)
from danlu.__main__ import main
main()
"""


def measured(peak: Path, *words: object) -> list[str]:
    """The command, in a process that leaves its peak memory (KiB) in `peak`.

    Not by getrusage: a child's ru_maxrss begins with what the forking test process had.
    """
    return [sys.executable, "-c", MEASURE, str(peak), *map(str, words)]


def environment(fault: str = "", **more: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if k not in ("DANLU_FAULT", "LANG", "LANGUAGE", "LC_ALL")}
    return base | {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "DANLU_FAULT": fault, **more}


def danlu(*words: object, fault: str = "", timeout: float = 120, **more: str) -> Ended:
    """Run one command to its end."""
    began = time.monotonic()
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout, env=environment(fault, **more),
                          check=False)
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def danlu_until(*words: object, seen: str, signals: tuple[int, ...], timeout: float = 120, gap: float = 0.3) -> Ended:
    """Start a command, wait for `seen` on its stderr, send it signals, and wait for its end."""
    began = time.monotonic()
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    err = ""
    for line in process.stderr:
        err += line
        if seen in line:
            break
    for number in signals:
        process.send_signal(number)
        time.sleep(gap)
    try:
        out, rest = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return Ended(code, out, err + rest, time.monotonic() - began)


def weights_hash(run: Path) -> str:
    """The hash of a run's newest weights, by `danlu ckpt hash`."""
    ended = danlu("ckpt", "hash", run).clean()
    assert ended.code == 0, ended.err
    return ended.out.strip()


def children_of(pid: int) -> list[str]:
    """Processes that still have this parent."""
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()

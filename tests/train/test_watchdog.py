"""A run that stands still ends by itself, with stacks and the name of the rank at fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import danlu
from danlu.train.watchdog import Watchdog, guilty, read


def dog(folder: Path, rank: int = 0, size: int = 1, seconds: float = 0.4, **more: Any) -> tuple[Watchdog, list[int]]:
    codes: list[int] = []
    return Watchdog(folder, seconds, SimpleNamespace(rank=rank, size=size), end=codes.append, **more), codes


def wait_for(codes: list[int], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not codes and time.monotonic() < end:
        time.sleep(0.02)


def test_beats_keep_it_quiet_and_nothing_is_left(tmp_path: Path) -> None:
    watchdog, codes = dog(tmp_path)
    with watchdog:
        for step in range(40):
            watchdog.beat(step)
            time.sleep(0.02)
        assert read(tmp_path)[0]["step"] >= 30
    assert codes == [] and list(tmp_path.iterdir()) == []


def test_a_hang_leaves_stacks_and_ends_with_75(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watchdog, codes = dog(tmp_path)

    def a_place_that_hangs() -> None:
        wait_for(codes)

    with watchdog:
        watchdog.beat(7)
        a_place_that_hangs()
    assert codes == [75]
    assert "a_place_that_hangs" in (tmp_path / "stacks" / "rank-0.txt").read_text()
    said = capsys.readouterr().err.strip()
    assert "rank 0 hangs after step 7" in said and "test_watchdog.py" in said and "\n" not in said


def test_the_first_step_has_longer(tmp_path: Path) -> None:
    watchdog, codes = dog(tmp_path, seconds=0.2, first=60.0)
    with watchdog:
        time.sleep(0.8)
        assert codes == []
        watchdog.beat(1)
        wait_for(codes)
    assert codes == [75]


def test_zero_switches_it_off(tmp_path: Path) -> None:
    watchdog, _codes = dog(tmp_path, seconds=0.0)
    with watchdog:
        watchdog.beat(1)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() >= 1


def test_a_step_that_ends_late_but_ends_goes_on(tmp_path: Path) -> None:
    watchdog, codes = dog(tmp_path, seconds=10.0)
    with watchdog:
        watchdog.beat(1)
        beat = threading.Timer(0.3, watchdog.beat, (2,))  # while it looks at the others, for 2.5 s
        beat.start()
        assert not watchdog._hangs()
        beat.join()
    assert codes == []


def line(rank: int, step: int, written: int = 1, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "step": step, "written": written, "when": 0.0, "hangs": False, "waits": False} | more


def test_who_is_at_fault() -> None:
    now = {0: line(0, 20, 5, hangs=True, waits=True, when=9.0), 1: line(1, 20, 5, hangs=True, waits=True, when=8.0)}
    assert guilty({0: line(0, 20), 1: line(1, 20, 5)}, {0: now[0], 1: line(1, 20, 5)}, 2)[0] == [1], "stopped: writes no more"
    assert guilty(now, now, 3)[0] == [2], "never came"
    assert guilty(now, now, 2) == ([], 1), "the older beat"
    assert guilty(now, now | {0: line(0, 20, 6, hangs=True, when=9.0)}, 2) == ([], 0), "the one that does not wait for others"
    assert guilty(now, now | {0: line(0, 19, 6, hangs=True, waits=True, when=9.0)}, 2) == ([], 0), "the lower step"


WORKER = """
import ctypes, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from danlu.train.watchdog import Watchdog
rank = int(sys.argv[2])
with Watchdog(Path(sys.argv[1]), 1.0, SimpleNamespace(rank=rank, size=2)) as watchdog:
    for step in range(1, 1000):
        watchdog.beat(step)
        time.sleep(0.05)
        if step == 10:
            {hang}
"""


def pair(folder: Path, *hangs: str) -> list[subprocess.Popen[str]]:
    env = os.environ | {"PYTHONPATH": str(Path(danlu.__file__).parent.parent)}
    return [subprocess.Popen([sys.executable, "-c", WORKER.format(hang=hang), str(folder), str(rank)], env=env, text=True,
                             stderr=subprocess.PIPE) for rank, hang in enumerate(hangs)]


def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path) -> None:
    witness, stopped = pair(tmp_path, "time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)")
    try:
        _out, said = witness.communicate(timeout=30)
        assert witness.returncode == 75
        assert "no sign of life from rank 1 (last heard of at step" in said, said
        assert json.loads((tmp_path / "heartbeat" / "rank-1.json").read_text())["hangs"] is False
    finally:
        stopped.kill()
        stopped.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="takes the interpreter's lock by way of glibc")
def test_who_never_lets_the_interpreter_go_is_ended_too(tmp_path: Path) -> None:
    witness, holder = pair(tmp_path, "time.sleep(60)", "ctypes.PyDLL(None).sleep(60)")
    try:
        _out, said = witness.communicate(timeout=30)
        assert witness.returncode == 75 and "rank 1" in said
        assert holder.wait(30) == 1
        assert "line 12 in <module>" in (tmp_path / "stacks" / "rank-1.txt").read_text()
    finally:
        for process in (witness, holder):
            process.kill()
            process.communicate()

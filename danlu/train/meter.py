"""What a run really needs: the peak memory and the seconds of each of its phases, measured by the process itself.

On Linux without CUDA the peak is that of the resident memory (VmHWM), which is reset between phases; on CUDA it is what
PyTorch's allocator counts.  Elsewhere the peak of one phase is the largest so far.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from danlu import parallel
from danlu.parallel import World

Phase = Literal["load", "resume", "evaluate", "data", "step", "save", "results", "other"]
PHASES: tuple[Phase, ...] = ("load", "resume", "evaluate", "data", "step", "save", "results", "other")
STEADY = {"data", "step", "other"}                      # steps follow each other, and need the same again
FIRST = 1                                                # steps that are left out of the median: they make state and kernels
RESET = Path("/proc/self/clear_refs")


def peak() -> int:
    """Return the bytes in use at most since the last reset: CUDA's where it is in use, else the resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":                          # ru_maxrss would begin with what the parent process had
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset() -> None:
    """Let the peak begin anew with what is in use now, where the system can."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):                          # a container may forbid it: then it is the largest so far
            RESET.write_text("5")


class Meter:
    """Which phase a process is in, and what each has taken so far."""

    def __init__(self) -> None:
        self.phase: Phase = "load"
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.steps: list[float] = []                     # seconds of each step, its data included
        self.at = time.perf_counter()

    def enter(self, phase: Phase) -> None:
        """End the phase that is under way, and begin another; a step begins with its data."""
        now = time.perf_counter()
        taken, before = now - self.at, self.phase
        self.seconds[before] = self.seconds.get(before, 0.0) + taken
        if before in ("data", "step"):
            self.steps.append(taken) if before == "data" or not self.steps else self.steps.__setitem__(-1, self.steps[-1] + taken)
        if phase != before and not {phase, before} <= STEADY:
            gc.collect()                                 # what only a cycle keeps would stay for an unknown time
            if before == "load" and gc.get_freeze_count():
                gc.freeze()
            parallel.give_back()
        if phase != before:
            self.peaks[before] = max(self.peaks.get(before, 0), peak())
            reset()
        self.phase, self.at = phase, time.perf_counter()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count what is done inside as `phase`, and go on with the one before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def record(self, world: World) -> dict[str, Any]:
        """Return the figures, the largest of all processes, JSON-ready; all of them call this."""
        self.enter("other")
        usual = self.steps[FIRST:] or self.steps
        held = torch.tensor([[float(self.peaks.get(name, 0)) for name in PHASES],
                             [self.seconds.get(name, 0.0) for name in PHASES]], dtype=torch.float64)
        most = world.most(held).tolist()
        return {"peak": {name: int(value) for name, value in zip(PHASES, most[0], strict=True) if value and name != "other"},
                "seconds": {name: value for name, value in zip(PHASES, most[1], strict=True) if value},
                "step_seconds": statistics.median(usual) if usual else None, "steps": len(self.steps)}

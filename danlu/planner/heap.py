"""What a process takes from the system while tensors begin and end: its allocator, played through.

On Linux without CUDA `parallel.start` lets glibc's malloc keep what is freed, and take everything from one heap.  So a page
that was ever written stays with the process: a freed block is used again for what fits into it, the best fitting one first,
neighbours that are free are joined, and what fits nowhere lengthens the heap.  Between phases `parallel.give_back` lets go
of the pages that hold nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

from danlu.rehearse.ledger import Event

PAGE = 4096
ALIGN = 64                                               # of PyTorch's blocks on a CPU
HEAD = 16                                                # bytes that malloc keeps beside a block
SEEK = ALIGN + 32                                        # … and asks for in addition, to find a place that is aligned
GRAIN, SMALL, MIDDLE = 512, 2**20, 2 * 2**20             # of PyTorch's caching allocator on CUDA


class Heap:
    """glibc's heap: free blocks by size and by place, and how far it has grown."""

    def __init__(self) -> None:
        self.top = 0
        self.pages = np.zeros(1024, bool)                # which are resident
        self.resident = 0                                # … and how many
        self.taken: dict[int, tuple[int, int]] = {}      # by key: where, and how long
        self.sizes: list[tuple[int, int]] = []           # (size, start) of free blocks
        self.starts: dict[int, int] = {}                 # of free blocks: size by start …
        self.ends: dict[int, int] = {}                   # … and start by end

    def take(self, key: int, size: int) -> None:
        """Give `key` a block."""
        need = -(-size // ALIGN) * ALIGN + HEAD + SEEK // 2
        at = bisect_left(self.sizes, (need, -1))
        if at < len(self.sizes):
            free, start = self.sizes[at]
            self._use(free, start)
            if free - need >= ALIGN:
                self._free(start + need, free - need)
            else:
                need = free
        else:
            start, self.top = self.top, self.top + need
        self.taken[key] = start, need
        self._touch(start, need)

    def _touch(self, start: int, size: int) -> None:
        first, last = start // PAGE, -(-(start + size) // PAGE)
        while last > len(self.pages):
            self.pages = np.concatenate((self.pages, np.zeros_like(self.pages)))
        part = self.pages[first:last]
        self.resident += len(part) - int(np.count_nonzero(part))
        part[:] = True

    def give_back(self) -> None:
        """Let go of the pages that hold nothing."""
        self.pages[:], self.resident = False, 0
        for start, size in self.taken.values():
            self._touch(start, size)

    def drop(self, key: int) -> None:
        """Free the block of `key`, and join it with free neighbours; at the end of the heap it becomes its top again."""
        start, size = self.taken.pop(key)
        if start + size in self.starts:
            after = self.starts[start + size]
            self._use(after, start + size)
            size += after
        if start in self.ends:
            before = self.ends[start]
            size, start = size + self.starts[before], before
            self._use(self.starts[before], before)
        if start + size == self.top:
            self.top = start
        else:
            self._free(start, size)

    def _free(self, start: int, size: int) -> None:
        insort(self.sizes, (size, start))
        self.starts[start], self.ends[start + size] = size, start

    def _use(self, size: int, start: int) -> None:
        del self.sizes[bisect_left(self.sizes, (size, start))]
        del self.starts[start], self.ends[start + size]


class Peaks(dict[str, int]):
    """Bytes of each phase at its peak."""

    def meet(self, phase: str, size: int) -> None:
        """Take note of a size."""
        self[phase] = max(self.get(phase, 0), size)


def resident(events: Iterable[Event]) -> tuple[Peaks, Peaks]:
    """Return of each phase the bytes that a process on a CPU has taken, mapped files included, and those of tensors in use."""
    heap, phase, mapped, live = Heap(), "", 0, 0
    peaks, tensors, sizes = Peaks(), Peaks(), dict[int, int]()
    for event in events:
        if event.phase:
            if event.phase != phase:
                heap.give_back()
            phase = event.phase
        elif event.mapped is not None:
            mapped = event.mapped
        elif event.size:
            heap.take(event.key, event.size)
            sizes[event.key] = event.size
            live += event.size
        elif event.key in sizes:
            heap.drop(event.key)
            live -= sizes.pop(event.key)
        peaks.meet(phase, heap.resident * PAGE + mapped)
        tensors.meet(phase, live)
    return peaks, tensors


def reserved(events: Iterable[Event]) -> Peaks:
    """Return of each phase the bytes that PyTorch's caching allocator counts as allocated on CUDA: sizes rounded up.

    Not measured: no GPU was there.
    """
    phase, live, peaks, sizes = "", 0, Peaks(), dict[int, int]()
    for event in events:
        if event.phase:
            phase = event.phase
        elif event.size:
            sizes[event.key] = -(-event.size // GRAIN) * GRAIN
            live += sizes[event.key]
        else:
            live -= sizes.pop(event.key, 0)
        peaks.meet(phase, live)
    return peaks

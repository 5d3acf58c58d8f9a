"""What tensors need of a device while they begin and end: bytes in use, and what the allocator adds to them.

On a CPU glibc's malloc keeps what is freed.  PyTorch's blocks are aligned, so a hole that one has left is too small for another
of the same size (glibc before 2.38 looks for the size plus the alignment), and what is taken and freed within a phase spreads
over more pages than it ever holds.  How far depends on addresses, which differ from process to process: of the bytes that come
and go, one model's evaluations took 1.2 to 2.25 times as many, its steps 1.4 to 1.7.  `SPREAD` was set between, so that a few
real runs come out right; it is fitted, not derived.  What stays through a phase is not spread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from danlu.rehearse.ledger import Event

SPREAD = {"load": 0.15, "evaluate": 0.75, "step": 0.6, "save": 0.15, "resume": 0.15}
GRAIN = 512                                              # bytes that PyTorch's caching allocator on CUDA rounds up to


class Need(NamedTuple):
    """Bytes of one process in a phase."""

    begin: int                                           # of tensors, when it begins
    tensors: int                                         # … and at its peak
    mapped: int                                          # of files that are mapped, at most
    rounded: int                                         # of tensors at the peak, each rounded up as on CUDA

    @property
    def spread(self) -> int:
        """What comes and goes."""
        return self.tensors - self.begin


def spread(phase: str, allocator: str) -> float:
    """Return what the allocator adds to what comes and goes in a phase, as a share of it."""
    return SPREAD.get(phase, 0.0) if allocator == "keep" else 0.0


def needs(events: Iterable[Event]) -> dict[str, Need]:
    """Return what each phase needs; of one that comes several times, the time it needs most."""
    found: dict[str, Need] = {}
    phase, live, rounded, mapped, now = "", 0, 0, 0, Need(0, 0, 0, 0)
    sizes: dict[int, int] = {}

    def close() -> None:
        if phase and (phase not in found or now.tensors + now.mapped > found[phase].tensors + found[phase].mapped):
            found[phase] = now

    for event in events:
        if event.phase:
            close()
            phase, now = event.phase, Need(live, live, mapped, rounded)
        elif event.mapped is not None:
            mapped = event.mapped
        elif event.size:
            sizes[event.key] = event.size
            live, rounded = live + event.size, rounded + up(event.size)
        elif event.key in sizes:
            size = sizes.pop(event.key)
            live, rounded = live - size, rounded - up(size)
        if live + mapped > now.tensors + now.mapped:
            now = Need(now.begin, live, mapped, rounded)
    close()
    return found


def up(size: int) -> int:
    """Return a size as PyTorch's caching allocator counts it."""
    return -(-size // GRAIN) * GRAIN

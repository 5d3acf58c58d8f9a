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
SMALL = SPREAD | {"step": 1.5}                           # … of small blocks alone, where the large ones go back
LARGE = 2 << 20                                          # bytes of a block that is a mapping of its own under allocator=return
GRAIN = 512                                              # bytes that PyTorch's caching allocator on CUDA rounds up to


class Need(NamedTuple):
    """Bytes of one process in a phase."""

    begin: int                                           # of tensors, when it begins
    tensors: int                                         # … and at its peak
    mapped: int                                          # of files that are mapped, at most
    rounded: int                                         # of tensors at the peak, each rounded up as on CUDA
    small: int                                           # what comes and goes of blocks below LARGE, at most
    code: int = 0                                        # of code made for shapes of products, up to the phase's end

    @property
    def spread(self) -> int:
        """What comes and goes."""
        return self.tensors - self.begin


def spread(need: Need, phase: str, allocator: str) -> int:
    """Return the bytes that the allocator adds in a phase: where large blocks go back at once, to small ones alone."""
    if allocator == "keep":
        return int(SPREAD.get(phase, 0.0) * need.spread)
    return int(SMALL.get(phase, 0.0) * need.small)


def needs(events: Iterable[Event]) -> dict[str, Need]:
    """Return what each phase needs; of one that comes several times, the time it needs most."""
    found: dict[str, Need] = {}
    phase, live, rounded, mapped, now = "", 0, 0, 0, Need(0, 0, 0, 0, 0)
    small = begun = most = code = 0                      # of small blocks: now, when the phase began, at most since
    sizes: dict[int, int] = {}

    def close() -> None:
        if phase and (phase not in found or now.tensors + now.mapped > found[phase].tensors + found[phase].mapped):
            found[phase] = now._replace(small=most - begun, code=code)

    for event in events:
        if event.phase:
            close()
            phase, now = event.phase, Need(live, live, mapped, rounded, 0)
            begun = most = small
        elif event.code:
            code += event.code
        elif event.mapped is not None:
            mapped = event.mapped
        elif event.size:
            sizes[event.key] = event.size
            live, rounded = live + event.size, rounded + up(event.size)
            small += event.size * (event.size < LARGE)
        elif event.key in sizes:
            size = sizes.pop(event.key)
            live, rounded = live - size, rounded - up(size)
            small -= size * (size < LARGE)
        most = max(most, small)
        if live + mapped > now.tensors + now.mapped:
            now = Need(now.begin, live, mapped, rounded, 0)
    close()
    return found


def up(size: int) -> int:
    """Return a size as PyTorch's caching allocator counts it."""
    return -(-size // GRAIN) * GRAIN

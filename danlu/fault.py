"""Planted faults, so that every failure in the tests is deterministic.

`fault("ckpt.before_manifest")` does nothing unless the point is armed: `DANLU_FAULT=name:action[:n]`, several joined
by commas; `n` counts the visits before the action happens (default 1: at the first).  `rank1.name:…` arms the point in
rank 1 only.  Arming is process-wide state, and the only such state in Danlu: a fault must reach places that know nothing
of each other.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from dataclasses import dataclass

ACTIONS = ("kill", "stop", "term", "raise", "enospc", "slow", "nan", "scale50", "bitflip", "truncate", "oom")
RANK = re.compile(r"rank(\d+)\.")


@dataclass
class _Armed:
    action: str
    visits_left: int


_armed: dict[str, _Armed] = {}


class PlantedFault(Exception):
    """Raised by an armed point whose action is `raise`."""


def arm(spec: str, *, rank: int = 0) -> None:
    """Arm every point named in `spec` for this rank.  Raises ValueError for a malformed one."""
    for item in filter(None, spec.split(",")):
        name, _, rest = item.partition(":")
        action, _, visits = rest.partition(":")
        if action not in ACTIONS:
            raise ValueError(f"DANLU_FAULT={item!r}: the action must be one of {', '.join(ACTIONS)}")
        chosen = RANK.match(name)
        if chosen is None or int(chosen[1]) == rank:
            _armed[name[chosen.end():] if chosen else name] = _Armed(action, int(visits or 1))


def armed() -> str:
    """Return what is still armed, as `arm` takes it, so that a child process can be armed alike."""
    return ",".join(f"{name}:{point.action}:{point.visits_left}" for name, point in _armed.items())


def fault(name: str) -> str | None:
    """Do what is armed at `name`; return the action for the caller to carry out when only it can (nan, bitflip …)."""
    armed = _armed.get(name)
    if armed is None:
        return None
    armed.visits_left -= 1
    if armed.visits_left > 0:
        return None
    if armed.action not in ("nan", "scale50"):      # those stay: they stand for a fault that persists
        del _armed[name]
    return _act(name, armed.action)


def _act(name: str, action: str) -> str | None:
    if action in ("kill", "stop", "term"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[action])
        return None
    if action == "raise":
        raise PlantedFault(f"planted fault at {name}")
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    if action == "slow":
        time.sleep(1.0)
        return None
    return action

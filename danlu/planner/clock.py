"""How long a step takes, by part, and what the whole run takes of time, energy and money.

Matrix products go at the machine's rate in the run's precision, everything else at the speed of its memory, messages at
that of its links.  A probe of a few real steps replaces all of them by what they take here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from danlu.planner.hardware import Machine
from danlu.rehearse import Rehearsal
from danlu.train.recipe import Run

HOUR = 3600.0
RETURNING = 1.13                                         # fresh pages for every large block (measured: 1.10 to 1.16, see LOG.md)
FORWARD = 1 / 3                                          # share of a step's work that an evaluation of as many rows does


class Work(NamedTuple):
    """What one process does in a step, and the run around it."""

    flops: int
    moved: int                                           # bytes that all but matrix products read and write
    data: float = 0.0                                    # seconds that making a batch takes
    steps: int = 1
    held_out: int = 0                                    # rows


class Time(NamedTuple):
    """Seconds."""

    compute: float
    memory: float
    messages: float
    bubble: float
    data: float
    evaluations: float
    saves: float
    steps: int
    probed: bool

    @property
    def step(self) -> float:
        """Of one step."""
        return self.compute + self.memory + self.messages + self.bubble + self.data

    @property
    def whole(self) -> float:
        """Of the whole run."""
        return self.steps * self.step + self.evaluations + self.saves

    def record(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return self._asdict() | {"step": self.step, "whole": self.whole}


def clock(run: Run, rehearsal: Rehearsal, machine: Machine, work: Work, *, checkpoint: int, probe: float | None = None) -> Time:
    """Return the time of a step and of the run.

    checkpoint: bytes of one; probe: seconds of a step, as measured in all of the layout's processes.
    """
    rate = machine.rate(run.precision) or machine.rate("fp32")
    compute = work.flops / rate if rate else math.inf
    memory = work.moved / machine.device.bandwidth
    if run.allocator == "return" and machine.device.kind == "cpu":
        compute, memory = compute * RETURNING, memory * RETURNING
    messages = sent(run, rehearsal, machine)
    bubble = (compute + memory) * rehearsal.bubble_by_work / (1 - rehearsal.bubble_by_work)
    if probe is not None:
        compute, memory, messages, bubble = probe, 0.0, 0.0, 0.0
    every, saves = run.every, 1 + (work.steps - 1) // run.every.save if run.every.save else 1
    evaluations = (2 + ((work.steps - 1) // every.evaluate if every.evaluate else 0)) if work.held_out else 0
    one = (compute + memory) * FORWARD * work.held_out / run.step_rows
    writing = checkpoint / machine.disk
    return Time(compute, memory, messages, bubble, 0.0 if run.workers else work.data, evaluations * one,
                writing + (saves - 1) * writing * 0.1, work.steps, probe is not None)


def sent(run: Run, rehearsal: Rehearsal, machine: Machine) -> float:
    """Return the seconds that a process's messages take in a step, none of them hidden behind work."""
    layout, total = run.layout, 0.0
    for line in rehearsal.largest.traffic.record():
        size = {"dp": layout.dp, "tp": layout.tp, "pp": layout.pp, "cp": layout.cp}.get(line["axis"], layout.dp * layout.cp)
        share = {"all-reduce": 2 * (size - 1) / size, "send": 1.0, "receive": 0.0}.get(line["kind"], (size - 1) / size)
        near = size * (1 if line["axis"] == "tp" else layout.tp) <= machine.device.node
        total += share * line["bytes"] / machine.between(near)
    return total


def cost(time: Time, machine: Machine) -> dict[str, float | None]:
    """Return device-hours, energy in kWh, and money in the user's currency (None: no price is known)."""
    hours = time.whole / HOUR * machine.count
    price = machine.device.price
    return {"device_hours": hours, "kwh": hours * machine.device.power / 1000, "money": None if price is None else hours * price}

"""Who works when in a pipeline: PyTorch's own tables of actions, played through.

An action begins as soon as its process is free and what it reads is there; sending takes no time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


class Action(NamedTuple):
    """Forward (F), backward (B), or its halves: towards the input (I) and the weights (W)."""

    kind: str
    stage: int
    micro: int


class Cost(NamedTuple):
    """Time of a stage's forward and backward pass; each half of the latter takes half of it."""

    forward: float = 1.0
    backward: float = 2.0

    def of(self, kind: str) -> float:
        return {"F": self.forward, "B": self.backward}.get(kind, self.backward / 2)


class Played(NamedTuple):
    """How long each process worked, and all of them together from first to last."""

    busy: tuple[float, ...]
    length: float

    @property
    def bubble(self) -> float:
        """Share of the step in which a process waits, on average."""
        return 1 - sum(self.busy) / (len(self.busy) * self.length)


def orders(schedule: Any) -> list[list[Action]]:
    """Return what each process of the pipeline does, one after the other, by PyTorch's schedule object."""
    table = getattr(schedule, "pipeline_order", None) or schedule._get_pipeline_order()
    made = []
    for rank in sorted(table):
        mine, seen = [], Counter[tuple[str, int]]()
        for action in table[rank]:
            kind = None if action is None else KINDS.get(action.computation_type.name)
            if kind is not None:
                # counted here: the table of 1F1B numbers the last stage's forward passes from 1
                mine.append(Action(kind, int(action.stage_index), seen[kind, action.stage_index]))
                seen[kind, action.stage_index] += 1
        made.append(mine)
    return made


def alone(micro: int) -> list[list[Action]]:
    """Return the order of a process that has all blocks."""
    return [[Action(kind, 0, number) for number in range(micro) for kind in "FB"]]


def play(order: Sequence[Sequence[Action]], costs: Mapping[int, Cost] | None = None) -> Played:
    """Play the orders through.  costs: of each stage; without, a forward pass takes 1 and a backward pass 2."""
    last = max(action.stage for mine in order for action in mine)
    ends: dict[tuple[str, int, int], float] = {}
    clock, busy, at = [0.0] * len(order), [0.0] * len(order), [0] * len(order)
    while any(place < len(mine) for place, mine in zip(at, order, strict=True)):
        moved = False
        for rank, mine in enumerate(order):
            while at[rank] < len(mine):
                action = mine[at[rank]]
                ready = _ready(action, last, ends)
                if ready is None:
                    break
                cost = (costs or {}).get(action.stage, Cost()).of(action.kind)
                clock[rank] = max(clock[rank], ready) + cost
                busy[rank] += cost
                ends["B" if action.kind == "I" else action.kind, action.stage, action.micro] = clock[rank]
                at[rank] += 1
                moved = True
        assert moved, "the order waits for itself"
    return Played(tuple(busy), max(clock))


def _ready(action: Action, last: int, ends: Mapping[tuple[str, int, int], float]) -> float | None:
    """Return when all that `action` reads is there; None if that is not known yet."""
    kind, stage, micro = action
    needs = {"F": [("F", stage - 1, micro)] if stage else [], "W": [("B", stage, micro)]}.get(
        kind, [("F", stage, micro), *([("B", stage + 1, micro)] if stage < last else [])])
    if any(need not in ends for need in needs):
        return None
    return max((ends[need] for need in needs), default=0.0)

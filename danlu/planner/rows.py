"""The rows of a run as batches: of a step of one process, and of an evaluation, as long as they can be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from danlu.objectives import Embed
from danlu.train.feed import Steps, stream
from danlu.train.recipe import Run
from danlu.train.run import AT_ONCE
from danlu.train.setup import Data, training_rows

LOOKED_AT = 64                                           # steps whose batches are made to find the longest
TIMED = 4                                                # … and to tell what making one takes


class Batches(NamedTuple):
    """The rows of a step of process 0, those of a batch that is only measured, and the seconds that making the first takes."""

    step: dict[str, Tensor]
    held_out: dict[str, Tensor] | None                   # None: nothing is held out
    seconds: float


def batches_of(run: Run, data: Data) -> Batches:
    """Return the batches of a run."""
    rows, total = training_rows(run, data)
    steps = Steps(rows, run.objective, data.tokenizer.special, per_step=run.step_rows, length=run.length, seed=run.seed,
                  position=rows.begin(), share=(0, run.layout.dp), tight=run.tight)
    batch, seconds = longest(steps, min(total, LOOKED_AT if run.tight else TIMED))
    return Batches(batch, held_out(run, data, batch), seconds)


def longest(steps: Steps, number: int) -> tuple[dict[str, Tensor], float]:
    """Return the longest of the first `number` batches, and the median seconds of making one, the first left out."""
    found: dict[str, Tensor] | None = None
    taken, at = list[float](), time.perf_counter()
    for batch, _after in islice(steps, number):
        taken.append(time.perf_counter() - at)
        if found is None or batch["ids"].shape[-1] > found["ids"].shape[-1]:
            found = batch
        at = time.perf_counter()
    assert found is not None, "a run has rows: it was checked when the data was opened"
    return found, statistics.median(taken[1:] or taken)


def held_out(run: Run, data: Data, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the largest batch that is only measured."""
    layout, found, most = run.layout, list[dict[str, Tensor]](), at_once(run)
    for shards, task in zip(data.held_out, data.held_tasks, strict=True):
        rows = stream(shards, run.objective, task=task, length=run.length, overlong=run.overlong, pack=run.pack, seed=None)
        number = rows.rows(0)
        steps = Steps(rows, run.objective, data.tokenizer.special, length=run.length, seed=0, position=rows.begin(),
                      per_step=min(number, most) if layout.world == 1 else most * layout.dp, rows_in_all=number,
                      share=(0, layout.dp), fill=layout.world > 1, tight=run.tight)
        found.append(longest(steps, LOOKED_AT if run.tight else 1)[0])
    return max(found, key=lambda batch: batch["ids"].numel(), default=None)


def at_once(run: Run) -> int:
    """Return how many rows a process measures at once."""
    if isinstance(run.objective, Embed) and run.objective.across:
        return run.part_rows
    return max(1, run.part_rows, AT_ONCE // run.length) if run.layout.pp == 1 else run.part_rows * run.layout.micro


def repeated(batch: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Return so many rows like those of `batch`."""
    index = torch.arange(rows) % len(batch["ids"])
    return {name: column[index] for name, column in batch.items()}

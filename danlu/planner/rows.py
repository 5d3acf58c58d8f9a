"""The rows of a run as batches: of a step of one process, and of an evaluation, as long as they can be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from danlu.objectives import Embed
from danlu.train.feed import Steps, stream
from danlu.train.recipe import Run
from danlu.train.run import AT_ONCE
from danlu.train.setup import Data, training_rows

LOOKED_AT = 64                                           # steps whose batches are made to find the longest


def batches_of(run: Run, data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the rows of a step of process 0, and of a batch that is only measured (None: nothing is held out)."""
    rows, total = training_rows(run, data)
    steps = Steps(rows, run.objective, data.tokenizer.special, per_step=run.step_rows, length=run.length, seed=run.seed,
                  position=rows.begin(), share=(0, run.layout.dp), tight=run.tight)
    batch = longest(steps, min(total, LOOKED_AT if run.tight else 1))
    return batch, held_out(run, data, batch)


def longest(steps: Steps, number: int) -> dict[str, Tensor]:
    """Return the longest of the first `number` batches."""
    found: dict[str, Tensor] | None = None
    for batch, _after in steps:
        if found is None or batch["ids"].shape[-1] > found["ids"].shape[-1]:
            found = batch
        number -= 1
        if number <= 0:
            break
    assert found is not None, "a run has rows: it was checked when the data was opened"
    return found


def held_out(run: Run, data: Data, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the largest batch that is only measured."""
    layout, found = run.layout, list[dict[str, Tensor]]()
    at_once = max(1, run.part_rows, AT_ONCE // run.length) if layout.pp == 1 else run.part_rows * layout.micro
    if isinstance(run.objective, Embed) and run.objective.across:
        at_once = run.part_rows
    for shards, task in zip(data.held_out, data.held_tasks, strict=True):
        rows = stream(shards, run.objective, task=task, length=run.length, overlong=run.overlong, pack=run.pack, seed=None)
        number = rows.rows(0)
        steps = Steps(rows, run.objective, data.tokenizer.special, length=run.length, seed=0, position=rows.begin(),
                      per_step=min(number, at_once) if layout.world == 1 else at_once * layout.dp, rows_in_all=number,
                      share=(0, layout.dp), fill=layout.world > 1, tight=run.tight)
        found.append(longest(steps, LOOKED_AT if run.tight else 1))
    return max(found, key=lambda batch: batch["ids"].numel(), default=None)


def repeated(batch: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Return so many rows like those of `batch`."""
    index = torch.arange(rows) % len(batch["ids"])
    return {name: column[index] for name, column in batch.items()}

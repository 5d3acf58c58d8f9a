"""Rows that stand in for data where only their shapes matter."""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.errors import ConfigError
from danlu.objectives.lm import MaskedLM
from danlu.objectives.mixture import Mixture
from danlu.objectives.protocol import Objective
from danlu.train.recipe import Run
from danlu.words import _


def columns(run: Run) -> dict[str, Tensor]:
    """Return one micro-batch of one process, as the objective's `collate` shapes it; only shapes matter."""
    rows, shape = run.part_rows, (run.part_rows, run.length)
    whole = {name: torch.zeros(shape, dtype=torch.int64) for name in ("ids", "labels", "positions", "types")}
    batch = whole | {"weights": torch.ones(shape), "segments": torch.ones(shape, dtype=torch.int32)}
    for term in run.objective.terms:
        if term in ("nsp", "sop"):
            batch |= {term: torch.zeros(rows, dtype=torch.int64), f"{term}_weights": torch.ones(rows)}
    tasks = run.objective.tasks()
    if tasks:
        batch |= _of_tasks(run, rows)
        return {name: column for name, column in batch.items() if name not in ("labels", "weights", "segments")}
    asked = {*run.objective.inputs, "weights"}
    return {name: column for name, column in batch.items() if name in asked or name.startswith(("nsp", "sop"))}


def _of_tasks(run: Run, rows: int) -> dict[str, Tensor]:
    """Return the columns of a task: what is true of each row.  ConfigError for tasks whose rows only data tells."""
    kind = run.objective.kind
    if kind not in ("classify", "regress"):
        raise ConfigError(_("rows of {kind} are read from data, which is not asked here").format(kind=kind), where="objective",
                          fix=_("danlu plan reads the data of the recipe; leave --vocab out"))
    several = getattr(run.objective, "several", False)
    shape = (rows, len(run.objective.labels)) if several else (rows,)       # type: ignore[union-attr]
    label = torch.zeros(shape, dtype=torch.float32 if several or kind == "regress" else torch.int64)
    return {"label": label, "label_weights": torch.ones(shape), "ends": torch.zeros(rows, dtype=torch.int64)}


def share(objective: Objective) -> float:
    """Return the share of tokens that are learned from."""
    parts = [part.objective for part in objective.parts] if isinstance(objective, Mixture) else [objective]
    return next((part.rate for part in parts if isinstance(part, MaskedLM)), 1.0)

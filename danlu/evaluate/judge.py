"""From what a model says of labelled rows to the figures of its task: collected batch by batch, judged once.

B rows, N rows of all batches, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.evaluate import metrics
from danlu.evaluate.metrics import Judged
from danlu.objectives import Classify, Objective, Regress
from danlu.objectives.protocol import Batch, Out

RESAMPLES = 200                                          # in training, where the interval is not shown


def can_judge(objective: Objective) -> bool:
    """Return whether there are figures of this objective beside its loss."""
    return isinstance(objective, Classify | Regress)


def require(objective: Objective) -> None:
    """Raise ConfigError unless the libraries that judge this objective are installed."""
    if can_judge(objective):
        metrics.require()


@dataclass
class Said:
    """What a model said of rows, and what is true of them, as columns of float64: `said` and `truth`, both [N, …]."""

    objective: Objective
    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, out: Out, batch: Batch) -> None:
        """Take in a batch; rows that only fill it up weigh 0."""
        assert isinstance(self.objective, Classify | Regress)
        here = {"said": out[self.objective.name], "truth": batch["label"], "counts": batch["label_weights"]}
        for name, column in here.items():
            self.columns.setdefault(name, []).append(column.detach().double().cpu())

    def arrays(self) -> dict[str, Tensor]:
        """Return the columns, each as one tensor; every process of a run has equally many rows."""
        return {name: torch.cat(parts) for name, parts in self.columns.items()}


def judge(objective: Objective, arrays: dict[str, Tensor], *, resamples: int = metrics.RESAMPLES) -> Judged:
    """Return the figures of the task for what `Said.arrays` gave."""
    counts = arrays["counts"].reshape(len(arrays["counts"]), -1)
    real = (counts > 0).any(1)
    found: dict[str, Any] = {name: np.asarray(column[real]) for name, column in arrays.items()}
    if isinstance(objective, Regress):
        return metrics.scores(found["truth"], found["said"][:, 0], resamples=resamples)
    assert isinstance(objective, Classify)
    if objective.several:
        return metrics.several(found["truth"], found["said"], objective.labels, resamples=resamples)
    return metrics.classes(found["truth"], found["said"], objective.labels, resamples=resamples)

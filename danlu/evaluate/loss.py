"""Loss on held-out rows: sums and counts per term, one division, an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.objectives.protocol import Batch, Objective


@dataclass(frozen=True)
class Loss:
    """Sums and counts per term over a data set, batch by batch; `bytes` = UTF-8 size of what is predicted, 0 = unknown."""

    terms: tuple[str, ...]
    scales: tuple[float, ...]
    sums: Tensor                                         # [batches, terms] float64
    counts: Tensor                                       # [batches, terms] float64
    bytes: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)       # of the task, by name

    def means(self) -> Tensor:
        """Return [terms] losses."""
        return self.sums.sum(0) / self.counts.sum(0).clamp(min=1e-12)

    def total(self) -> float:
        """Return the weighted sum of the terms, as it is trained on."""
        return float((self.means() * torch.tensor(self.scales, dtype=torch.float64)).sum())

    def values(self, prefix: str = "") -> dict[str, float]:
        """Return the metrics under the field's names."""
        means = self.means()
        result = {f"{prefix}loss": self.total()}
        if len(self.terms) > 1:
            result |= {f"{prefix}{name}_loss": float(value) for name, value in zip(self.terms, means, strict=True)
                       if "/" not in name}               # a task's own are among its figures
        if self.terms[0] in ("lm", "mlm"):
            result[f"{prefix}perplexity"] = math.exp(min(float(means[0]), 700.0))
        if self.terms[0] == "lm" and self.bytes:
            result[f"{prefix}bits_per_byte"] = float(self.sums[:, 0].sum()) / math.log(2) / self.bytes
        return {f"{prefix}{name}": value for name, value in self.figures.items()} | result


def predicted_bytes(shards: Shards, tokenizer: Tokenizer) -> int:
    """Return the bytes of the tokens that are predicted: all but first ones, which have nothing before them."""
    total = int(shards.column("bytes").sum())
    for number in range(shards.documents):
        first = shards.part(number, 0, 1)[0]
        if len(first) and not tokenizer.special.reserved[first[0]]:
            total -= len(tokenizer.pieces[int(first[0])])
    return total


class Modal(Protocol):
    """What can be in training mode or not: a module, or a process's part of one."""

    @property
    def training(self) -> bool: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


@torch.no_grad()
def measure(model: Modal, objective: Objective, batches: Iterable[Batch],
            sums: Callable[[Batch], Tensor], *, bytes: int = 0) -> Loss:
    """Return the loss of `model` over `batches` in evaluation mode; the mode before is put back.

    `sums` gives [terms] sums of one batch under the run's precision (`Engine.sums`).
    """
    training = model.training
    model.eval()
    rows, counts = [], []
    try:
        for batch in batches:
            rows.append(sums(batch).double().cpu())
            counts.append(objective.count(batch).double().cpu())
    finally:
        model.train(training)
    return Loss(objective.terms, objective.scales, torch.stack(rows), torch.stack(counts), bytes)

"""How far a smaller model is from the one it was made from, on the same rows; and how many numbers it has.

K classes or ids of what is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.compress.rows import Rows
from danlu.nn import packed


@dataclass(frozen=True)
class Distance:
    """How far two models are apart.  Of numbers that are no scores of classes there is neither divergence nor a likeliest."""

    difference: float                   # the largest, of any number said
    largest: float                      # number that the first said
    divergence: float | None            # mean Kullback-Leibler divergence from the first, nats
    agreement: float | None             # share for which both find the same likeliest
    compared: int                       # rows or tokens

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values."""
        return {"max_abs": self.difference, "largest": self.largest, "kl": self.divergence, "top1_agreement": self.agreement,
                "compared": self.compared}


@torch.no_grad()
def distance(before: Any, after: Any, rows: Rows) -> Distance:
    """Return how far `after` is from `before` on `rows`, both in evaluation mode."""
    difference = largest = divergence = 0.0
    same = scored = compared = 0
    for row in rows:
        said, now = _said(before, row), _said(after, row)
        for name, old in said.items():
            new = now[name]
            difference = max(difference, float((new - old).abs().max()))
            largest = max(largest, float(old.abs().max()))
            compared += old[..., 0].numel()
            if name not in _plain(before) and old.shape[-1] > 1:
                over = -2 if name in _places(before) else -1            # where an answer begins and ends: places of the row
                p, q = old.log_softmax(over), new.log_softmax(over)
                divergence += float((p.exp() * (p - q)).sum())
                same += int((old.argmax(over) == new.argmax(over)).sum())
                scored += old.argmax(over).numel()
    worst = math.inf if math.isnan(difference) else difference
    return Distance(worst, largest, divergence / scored if scored else None, same / scored if scored else None, compared)


def _plain(model: Any) -> set[str]:
    """Return the outputs that are no scores of classes."""
    return {"hidden", "pooled", *(task.name for task in model.cfg.tasks if task.kind == "embed")}


def _places(model: Any) -> set[str]:
    """Return the outputs [.., T, 2] that score the T places of a row."""
    return {task.name for task in model.cfg.tasks if task.kind == "answer"}


def _said(model: Any, row: Any) -> dict[str, Tensor]:
    """Return what the heads say of a row; of a model without any, its last block."""
    out = {name: t.double() for name, t in model(**row).items() if isinstance(t, Tensor)}
    return {name: t for name, t in out.items() if name not in ("hidden", "pooled")} or out


def numbers(model: Any) -> tuple[int, int]:
    """Return how many weights a model has, however they are stored, and how many of them are not zero."""
    count = there = 0
    seen: set[int] = set()                               # what is tied stands in several places
    for layer in model.modules():
        held = [layer.weight] if isinstance(layer, packed.PackedLinear | packed.PackedEmbedding) else []
        if isinstance(layer, packed.LowLinear) and layer.form.rounded is not None:
            held = [*packed.thin(layer)]
        for weight in [*held, *layer.parameters(recurse=False)]:
            if id(weight) not in seen:
                seen |= {id(weight)} if not held else set()
                count, there = count + weight.numel(), there + int(weight.count_nonzero())
    return count, there

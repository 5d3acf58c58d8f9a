"""Which of several texts goes with a text: a score for each, and the highest is chosen.

B rows, T tokens, P choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.nn.tasks import Head
from danlu.objectives.classify import full
from danlu.objectives.frame import labels_of, origin, padded, stretched, to_batch
from danlu.objectives.protocol import Batch, Out, Rng, Row


class Choose(Model):
    """A text and its possible endings or answers, of which one is right; rows may have different numbers of them.

    All choices of a row stand in it, each with the text before it; they do not see each other.
    """

    terms: ClassVar[tuple[str, ...]] = ("choose",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "types", "starts", "ends")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    wants: ClassVar[str] = "choice"

    kind: Literal["choose"] = "choose"
    name: str = Field("choose", description="Name of the head.")
    smoothing: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="Share of the target spread evenly over the choices of a row.")

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.name,)

    def tasks(self) -> tuple[Head, ...]:
        """Return the head that the model must have."""
        return (Head(kind="choose", name=self.name),)

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 0

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, segments, positions [B, T], starts, ends, there [B, P], label, label_weights [B]; types [B, T] where
        the text and the choice are of different types."""
        pairs = padded(rows, "parts")
        pairs = np.pad(pairs, ((0, 0), (0, pairs.shape[1] % 2))).reshape(len(rows), -1, 2)      # [B, P, 2]
        columns = stretched(rows, vocab, length, pairs.sum(2))
        if pairs[:, :, 1].any():
            kinds = np.repeat(np.tile([0, 1], pairs.shape[0] * pairs.shape[1]), pairs.ravel())
            columns["types"] = np.zeros(columns["ids"].shape, np.int64)
            columns["types"][columns["segments"] > 0] = kinds
        label, weights = labels_of(rows, np.int64)
        return to_batch(columns | origin(rows) | {"label": label, "label_weights": weights})

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["label_weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: cross-entropy over the choices of each row, summed."""
        chances = torch.log_softmax(preferred(out[self.name], batch), 1)
        right = chances.gather(1, batch["label"][:, None])[:, 0]
        if self.smoothing:
            there = batch["there"].bool()
            even = chances.masked_fill(~there, 0).sum(1) / there.sum(1)
            right = (1 - self.smoothing) * right + self.smoothing * even
        return -(right * batch["label_weights"]).sum()[None]


def preferred(logits: Tensor, batch: Batch) -> Tensor:
    """Return the scores [B, P] with -inf where a row has no such choice."""
    return full(logits).masked_fill(batch["there"] == 0, -torch.inf)

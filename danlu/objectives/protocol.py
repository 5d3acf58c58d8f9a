"""What an objective is: four functions between rows, a batch and what the model put out.

B rows, T tokens, V vocabulary, N positions that are learned from.  A term is one summand of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor

from danlu.data.tokenizer import Special
from danlu.nn.tasks import Head

Row = Mapping[str, np.ndarray]      # ids [n], weights [n] (0 = only read), segments [n] (1..k), key [4], other [m] …
Batch = dict[str, Tensor]           # ids, labels, weights, segments, positions …; first dimension = rows
Out = Mapping[str, Any]             # what a model returns: head -> Scores or Tensor
Rng = Callable[[np.ndarray, str], np.random.Generator]      # (row key, purpose) -> the same generator every time

UNLEARNED = -100                    # the label wherever the weight is 0: to gather it is an error, never a wrong loss


class Objective(Protocol):
    """What is learned.  `loss` and `count` are sums, so any split of the rows gives the same total."""

    @property
    def kind(self) -> str:
        """What a recipe calls it."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the summands."""

    @property
    def scales(self) -> tuple[float, ...]:
        """Weight of each term in the total."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads the model must have: lm, mlm, nsp, sop, or those of tasks by name."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Columns of the batch that go to the model as keywords; those that are absent stay out."""

    @property
    def partner(self) -> bool:
        """Whether rows must carry `other`."""

    @property
    def packs(self) -> bool:
        """Whether a row may hold several documents."""

    @property
    def wants(self) -> str:
        """What rows are learned from, as data/detect.py names it: text, chat, label, labels, score, tags …"""

    def tasks(self) -> tuple[Head, ...]:
        """Return the heads of tasks that the model must have, once `meet` has told the classes."""

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        """Return the objective with what it must know of the data: its classes, and how often each stands there."""

    def room(self, length: int) -> tuple[int, int, int]:
        """Return (ids in a row, ids that pieces of one document share, places each piece needs beside its ids)."""

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return the rows as tensors of exactly `length` tokens: shifted, masked, paired, padded.  CPU only."""

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        """Return the batch with the columns that frozen models write."""

    def count(self, batch: Batch) -> Tensor:
        """Return the denominators [terms], float64."""

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return the sums [terms], float32: never means."""

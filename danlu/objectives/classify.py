"""What a row is: one class of several, any number of classes, or a score.

B rows, T tokens, K classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.errors import ConfigError
from danlu.nn.tasks import Head
from danlu.objectives.frame import rectangle, to_batch
from danlu.objectives.protocol import Batch, Out, Rng, Row
from danlu.words import _

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Classify(Model):
    """A text, or a pair of texts, belongs to one class, or with `several` to any number of them.

    The classes are those of the training data, and stand with the model as `id2label`.
    """

    terms: ClassVar[tuple[str, ...]] = ("classify",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "types", "ends")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    kind: Literal["classify"] = "classify"
    name: str = Field("classify", description="Name of the head.")
    several: bool = Field(False, description="A row may have any number of classes, none included.")
    labels: tuple[str, ...] = Field((), description="Names of the classes; empty: those of the training data.")
    smoothing: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="Share of the target spread evenly over the classes.")
    focal: float = Field(0.0, ge=0, allow_inf_nan=False, description="Focal loss: how much less sure rows count (Lin et al., "
                         "2017: 2); 0: cross-entropy.")
    class_weights: Literal["none", "balanced"] | dict[str, Weight] = Field(
        "none", description="Weight of each class in the loss; balanced: inverse to how often it stands in the training data.")

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def wants(self) -> str:
        return "labels" if self.several else "label"

    def tasks(self) -> tuple[Head, ...]:
        """Return the head that the model must have, once the classes are known."""
        return (Head(name=self.name, labels=self.labels, problem="multi" if self.several else "single"),)

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        """Return the objective with the classes of the data, of which each stands there `counts` times."""
        return self.model_copy(update={"labels": tuple(labels), "class_weights": balanced(self.class_weights, labels, counts)})

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 0

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, types [B, T], ends [B], label [B] or [B, K], label_weights [B] or [B, K], row_weights [B] (and positions,
        segments).
        """
        label = np.stack([row["label"] for row in rows])
        weights = self._weights()
        if self.several:
            columns = {"label": label.astype(np.float32), "label_weights": np.broadcast_to(weights, label.shape).copy()}
        else:
            columns = {"label": label.astype(np.int64), "label_weights": weights[label]}
        return to_batch(rectangle(rows, vocab, length) | columns | {"row_weights": np.ones(len(rows), np.float32)})

    def _weights(self) -> np.ndarray:
        assert isinstance(self.class_weights, dict) or self.class_weights == "none", "the data is met before batches are made"
        given = self.class_weights if isinstance(self.class_weights, dict) else {}
        return np.array([given.get(name, 1.0) for name in self.labels], np.float32)

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        total = batch["label_weights"].sum(dtype=torch.float64)
        return (total / batch["label_weights"].shape[-1] if self.several else total)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: cross-entropy (of several classes, binary and averaged over them), summed by weight."""
        logits, label, weights = full(out[self.name]), batch["label"], batch["label_weights"]
        if self.several:
            target = label.to(logits.dtype) * (1 - self.smoothing) + self.smoothing / 2
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            if self.focal:
                sure = torch.where(label > 0.5, logits, -logits).sigmoid()
                losses = losses * (1 - sure) ** self.focal
            return ((losses * weights).sum() / logits.shape[-1])[None]
        losses = F.cross_entropy(logits, label, reduction="none", label_smoothing=self.smoothing)
        if self.focal:
            sure = torch.softmax(logits, -1).gather(1, label[:, None])[:, 0]
            losses = losses * (1 - sure) ** self.focal
        return (losses * weights).sum()[None]


class Regress(Model):
    """A text, or a pair of texts, has a score; the loss is the squared error."""

    terms: ClassVar[tuple[str, ...]] = ("regress",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "types", "ends")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    wants: ClassVar[str] = "score"

    kind: Literal["regress"] = "regress"
    name: str = Field("classify", description="Name of the head.")

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.name,)

    def tasks(self) -> tuple[Head, ...]:
        """Return the head that the model must have."""
        return (Head(name=self.name, problem="regression"),)

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 0

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, types [B, T], ends, label, label_weights, row_weights [B] (and positions, segments)."""
        label = np.array([row["label"] for row in rows], np.float32)
        columns = {"label": label, "label_weights": np.ones(len(rows), np.float32), "row_weights": np.ones(len(rows), np.float32)}
        return to_batch(rectangle(rows, vocab, length) | columns)

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["label_weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: squared errors, summed."""
        said = full(out[self.name])[:, 0]
        return ((said - batch["label"].to(said.dtype)).square() * batch["label_weights"]).sum()[None]


def balanced(weights: str | dict[str, float], labels: Sequence[str], counts: Sequence[int]) -> str | dict[str, float]:
    """Return the weights of classes; `balanced` as scikit-learn has it: inverse to their counts.

    Raises ConfigError for the weight of a class that the data does not have.
    """
    if isinstance(weights, dict) and labels and (odd := [name for name in weights if name not in labels]):
        near = difflib.get_close_matches(odd[0].lower(), [name.lower() for name in labels], 1)
        meant = next((name for name in labels if near and name.lower() == near[0]), None)
        raise ConfigError(_("there is no class {name!r}; there are {names}").format(name=odd[0], names=", ".join(labels[:8])),
                          where="objective.class_weights",
                          fix=_("did you mean {near}?").format(near=meant) if meant else None)
    if weights != "balanced":
        return weights
    return {name: sum(counts) / (len(labels) * max(1, n)) for name, n in zip(labels, counts, strict=True)}


def full(logits: Tensor) -> Tensor:
    """Return logits of at least fp32, in which losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

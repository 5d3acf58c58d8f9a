"""What a text means as a vector: texts that are alike lie in one direction, others in others.

B rows, T tokens, D width, P texts of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.errors import DataError
from danlu.nn.tasks import Head
from danlu.objectives.classify import full
from danlu.objectives.frame import labels_of, origin, padded, stretched, to_batch
from danlu.objectives.protocol import Batch, Out, Rng, Row
from danlu.words import _


class Embed(Model):
    """Texts become vectors, the mean of their tokens.  A row holds texts that belong together, which do not see each other.

    contrastive: an anchor, a text like it and perhaps texts unlike it; the texts of the other rows of a micro-batch are
    unlike it, too (Henderson et al., 2017).  cosine: two texts and a score, and their cosine is to be that.
    """

    terms: ClassVar[tuple[str, ...]] = ("embed",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "starts", "ends")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    wants: ClassVar[str] = "similar"

    kind: Literal["embed"] = "embed"
    name: str = Field("embed", description="Name of the head.")
    loss_kind: Literal["contrastive", "cosine"] = Field(
        "contrastive", alias="loss", description="contrastive: find the text like it among all of the micro-batch; cosine: of "
        "two texts with a score.")
    temperature: float = Field(
        0.05, gt=0, allow_inf_nan=False, description="What cosines are divided by in the contrastive loss.")
    scores: tuple[float, float] = Field((0.0, 1.0), description="The least and the greatest score of how alike two texts are; "
                                        "they become cosines of 0 and 1.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.scores[0] < self.scores[1]:
            raise ValueError(_("scores must rise, not {scores}").format(scores=self.scores))
        return self

    @property
    def across(self) -> bool:
        """Whether the loss of a row depends on which rows share its micro-batch."""
        return self.loss_kind == "contrastive"

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.name,)

    def tasks(self) -> tuple[Head, ...]:
        """Return the head that the model must have; it has no weights."""
        return (Head(kind="embed", name=self.name),)

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 0

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, segments, positions [B, T], starts, ends, there [B, P], and with scores label, label_weights [B].

        Raises DataError where scores and the loss do not go together.
        """
        columns = stretched(rows, vocab, length, padded(rows, "parts")) | origin(rows)
        if self.across:
            if any("label" in row for row in rows):
                raise DataError(_("these texts have a score of how alike they are, which the contrastive loss does not read"),
                                fix=_("set objective.loss=cosine, or give texts that are alike as anchor and positive"))
            return to_batch(columns)
        score, weights = labels_of(rows, np.float32)
        if not weights.all() and (columns["there"].sum(1) > 1).all():
            raise DataError(_("these texts have no score of how alike they are"), fix=_("set objective.loss=contrastive"))
        low, high = self.scores
        if score.min() < low or score.max() > high:
            raise DataError(_("a score of {low:g} to {high:g} does not lie within {scores}").format(
                low=float(score.min()), high=float(score.max()), scores=self.scores),
                fix=_("set objective.scores to the least and the greatest score that there can be"))
        return to_batch(columns | {"label": (score - low) / (high - low), "label_weights": weights})

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["row_weights" if self.across else "label_weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: contrastive, the cross-entropy of finding the text like the anchor; cosine, the squared error; summed."""
        vectors = F.normalize(full(out[self.name]), dim=-1)                                 # [B, P, D]
        if not self.across:
            cosine = (vectors[:, 0] * vectors[:, 1]).sum(-1)
            return ((cosine - batch["label"].to(cosine.dtype)).square() * batch["label_weights"]).sum()[None]
        rows, others = len(vectors), vectors.shape[1] - 1
        real = batch["row_weights"] > 0                                                     # others only fill the batch
        scores = vectors[:, 0] @ vectors[:, 1:].flatten(0, 1).mT / self.temperature         # [B, B(P-1)]
        missing = (batch["there"][:, 1:] == 0) | ~real[:, None]
        own = torch.arange(rows, device=scores.device) * others
        scores = scores.masked_fill(missing.flatten() & (torch.arange(rows * others, device=scores.device) != own[:, None]),
                                    -torch.inf)
        losses = F.cross_entropy(scores, own, reduction="none")
        return (losses * batch["row_weights"]).sum()[None]

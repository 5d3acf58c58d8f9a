"""What each word is: a class for every token that begins a word.

B rows, T tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.nn.tasks import Head
from danlu.objectives.classify import Weight, balanced, full
from danlu.objectives.frame import origin, rectangle, spread, to_batch
from danlu.objectives.protocol import UNLEARNED, Batch, Out, Rng, Row


class Tag(Model):
    """Each word has a class: names of people and places (B-PER, I-PER, O), parts of speech.

    A word is several tokens; its class is learned at the first, or at all, and always read off the first.
    """

    terms: ClassVar[tuple[str, ...]] = ("tag",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "types", "ends")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    wants: ClassVar[str] = "tags"

    kind: Literal["tag"] = "tag"
    name: str = Field("tag", description="Name of the head.")
    labels: tuple[str, ...] = Field((), description="Names of the tags; empty: those of the training data.")
    pieces: Literal["first", "all"] = Field(
        "first", description="Tokens of a word that learn its tag; of B-X, the others learn I-X where there is such a tag.")
    smoothing: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="Share of the target spread evenly over the tags.")
    class_weights: Literal["none", "balanced"] | dict[str, Weight] = Field(
        "none", description="Weight of each tag in the loss; balanced: inverse to how often it stands in the training data.")

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.name,)

    def tasks(self) -> tuple[Head, ...]:
        """Return the head that the model must have, once the tags are known."""
        return (Head(kind="tag", name=self.name, labels=self.labels),)

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        """Return the objective with the tags of the data, of which each stands there `counts` times."""
        return self.model_copy(update={"labels": tuple(labels), "class_weights": balanced(self.class_weights, labels, counts)})

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 0

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, tags, tag_weights, words, types [B, T], ends [B] and where the rows come from (and positions, segments).

        tags: -100 where nothing is learned, -1 where the tag of a word is not known.  words: the number of the word that
        begins here, -1 for none.
        """
        columns = rectangle(rows, vocab, length)
        sizes = np.array([len(row["ids"]) for row in rows])
        at = np.arange(sizes.sum()) + np.repeat(np.arange(len(rows)) * length - (np.cumsum(sizes) - sizes), sizes)
        tags = spread(np.concatenate([row["tags"] for row in rows]), at, columns["ids"].shape, UNLEARNED, np.int64)
        begins = tags != UNLEARNED
        first = np.array([row["window"][2] if "window" in row else 0 for row in rows])
        words = np.where(begins, begins.cumsum(1) - 1 + first[:, None], -1)
        if self.pieces == "all":
            tags = self._carried(tags, columns["ids"], columns["segments"], vocab)
        assert isinstance(self.class_weights, dict) or self.class_weights == "none", "the data is met before batches are made"
        given = self.class_weights if isinstance(self.class_weights, dict) else {}
        weights = np.array([given.get(name, 1.0) for name in self.labels], np.float32)
        return to_batch(columns | origin(rows) | {
            "tags": tags, "tag_weights": np.where(tags >= 0, weights[np.maximum(tags, 0)], np.float32(0)), "words": words})

    def _carried(self, tags: np.ndarray, ids: np.ndarray, segments: np.ndarray, vocab: Special) -> np.ndarray:
        """Return tags [B, T] in which every piece of a word has one: B-X goes on as I-X."""
        goes_on = [self.labels.index(f"I-{name[2:]}") if name[:2] == "B-" and f"I-{name[2:]}" in self.labels else number
                   for number, name in enumerate(self.labels)]
        marks = [i for i in (vocab.cls, vocab.sep, vocab.bos, vocab.eos, vocab.pad) if i is not None]
        here = np.broadcast_to(np.arange(tags.shape[1]), tags.shape)
        last = np.maximum.accumulate(np.where(tags != UNLEARNED, here, -1), 1)      # where the word began
        begun = np.take_along_axis(tags, np.maximum(last, 0), 1)
        inner = (tags == UNLEARNED) & (last >= 0) & (segments > 0) & ~np.isin(ids, marks) & (begun >= 0)
        return np.where(inner, np.array(goes_on)[np.maximum(begun, 0)], tags)

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["tag_weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: cross-entropy, summed by weight."""
        logits, tags = full(out[self.name]), batch["tags"]
        losses = F.cross_entropy(logits.flatten(0, 1), tags.masked_fill(tags < 0, UNLEARNED).flatten(),
                                 reduction="none", label_smoothing=self.smoothing, ignore_index=UNLEARNED)
        return (losses * batch["tag_weights"].flatten()).sum()[None]

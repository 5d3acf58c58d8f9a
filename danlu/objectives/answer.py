"""Where the answer to a question stands in a text: its first and its last token.

B rows, T tokens.
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
from danlu.objectives.classify import full
from danlu.objectives.frame import origin, rectangle, to_batch
from danlu.objectives.protocol import Batch, Out, Rng, Row


class Answer(Model):
    """A question and a context; the answer is a stretch of the context, or there is none (Rajpurkar et al., 2016, 2018).

    A context that is longer than a row gives several rows.  No answer is the row's first token, at both ends.
    """

    terms: ClassVar[tuple[str, ...]] = ("answer",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "types", "ends")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    wants: ClassVar[str] = "answer"

    kind: Literal["answer"] = "answer"
    name: str = Field("answer", description="Name of the head.")
    stride: int = Field(128, ge=0, description="Tokens that neighbouring windows of a long context share; at most half a row.")
    max_answer_tokens: int = Field(30, ge=1, description="Longest answer that is looked for.")
    may_be_empty: bool = Field(False, description="Whether a question to be answered may have no answer in its context; so it is "
                               "where some of the rows that a run is given have none.")
    null_threshold: float = Field(0.0, allow_inf_nan=False, description="How far no answer must score above the best answer to "
                                  "be given, where there may be none.")

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.name,)

    def tasks(self) -> tuple[Head, ...]:
        """Return the head that the model must have."""
        return (Head(kind="answer", name=self.name),)

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 0

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, types [B, T], ends [B], answer [B, 2] and where the rows come from (and positions, segments)."""
        answer = np.stack([row["answer"] for row in rows]).astype(np.int64)
        return to_batch(rectangle(rows, vocab, length) | origin(rows) | {"answer": np.maximum(answer, 0)})

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["row_weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: the mean of the cross-entropies of the first and the last token over the tokens of a row, summed."""
        logits = scored(out[self.name], batch).mT                                       # [B, 2, T]
        losses = F.cross_entropy(logits.flatten(0, 1), batch["answer"].flatten(), reduction="none").view(-1, 2).mean(1)
        return (losses * batch["row_weights"]).sum()[None]


def scored(logits: Tensor, batch: Batch) -> Tensor:
    """Return the logits [B, T, 2] with -inf on padding, so that a row says the same in a longer batch."""
    beyond = torch.arange(logits.shape[1], device=logits.device) > batch["ends"][:, None]
    return full(logits).masked_fill(beyond[:, :, None], -torch.inf)


def best_spans(logits: Tensor, batch: Batch, *, most: int) -> Tensor:
    """Return [B, 4] float64 of each row: the score of its best answer, its first and last token in the context, and the
    score of no answer.

    logits [B, T, 2]; an answer has at most `most` tokens, all in the context.
    """
    logits = scored(logits, batch).double()
    begin, size, first = batch["window"].unbind(1)
    place = torch.arange(logits.shape[1], device=logits.device)
    outside = (place < begin[:, None]) | (place >= (begin + size)[:, None])
    starts, stops = (part.masked_fill(outside, -torch.inf) for part in logits.unbind(2))
    length = min(most, logits.shape[1])
    reach = F.pad(stops, (0, length - 1), value=-torch.inf).unfold(1, length, 1)        # [B, T, most] ends from each start on
    score, last = (starts[:, :, None] + reach).flatten(1).max(1)
    start, more = last // length, last % length
    shift = first - begin
    return torch.stack((score, start + shift, start + more + shift, logits[:, 0].sum(1)), 1)

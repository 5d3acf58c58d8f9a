"""Language modelling: the next token (GPT; Radford et al., 2018) or hidden ones (BERT; Devlin et al., 2019).

B rows, T tokens, V vocabulary, N positions that are learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.nn.tasks import Head
from danlu.objectives.frame import Columns, flatten, needed, pad_id, since, spread, to_batch, wrap
from danlu.objectives.protocol import UNLEARNED, Batch, Out, Rng, Row
from danlu.words import _


class CausalLM(Model):
    """Each token is predicted from those before it in its document.

    The shift happens here and nowhere else: a row of n ids gives n-1 inputs, and no label crosses a document's border.
    """

    heads: ClassVar[tuple[str, ...]] = ("lm",)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "labels", "weights")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    wants: ClassVar[str] = "chat"

    kind: Literal["causal_lm"] = "causal_lm"
    smoothing: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="Share of the target spread evenly over the vocabulary.")
    z_loss: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Weight of log²Z, which keeps logits from drifting (PaLM: 1e-4).")

    @property
    def terms(self) -> tuple[str, ...]:
        return ("lm", "z") if self.z_loss else ("lm",)

    @property
    def scales(self) -> tuple[float, ...]:
        return (1.0, self.z_loss) if self.z_loss else (1.0,)

    def tasks(self) -> tuple[Head, ...]:
        return ()

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length + 1, 1, 0

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, labels, weights (and positions, segments unless every row is one full document), [B, T]."""
        flat = flatten(rows)
        assert flat.sizes.max() <= length + 1, "a row does not fit: ask room() for its size"
        source = np.flatnonzero(flat.place < np.repeat(flat.sizes - 1, flat.sizes))    # all but each row's last id
        weights = np.where(flat.first[source + 1], 0, flat.weights[source + 1])
        labels = np.where(weights == 0, UNLEARNED, flat.ids[source + 1])
        at, shape = flat.row[source] * length + flat.place[source], (len(rows), length)
        return to_batch({
            "ids": spread(flat.ids[source], at, shape, pad_id(vocab), np.int64),
            "labels": spread(labels, at, shape, UNLEARNED, np.int64),
            "weights": spread(weights, at, shape, 0, np.float32),
            "positions": spread(since(flat.first)[source], at, shape, 0, np.int64),
            "segments": spread(flat.segments[source], at, shape, 0, np.int32),
        })

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["weights"].sum(dtype=torch.float64).expand(len(self.terms))

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [terms]: cross-entropy (as torch's `label_smoothing` defines it) and log²Z, summed by weight."""
        scores = out["lm"]
        weights = batch["weights"].flatten()[scores.index]
        fit = (1 - self.smoothing) * scores.logp + self.smoothing * scores.mean if self.smoothing else scores.logp
        sums = [-(fit * weights).sum()]
        if self.z_loss:
            sums.append((scores.logz.square() * weights).sum())
        return torch.stack(sums)


class MaskedLM(Model):
    """Hidden tokens are predicted from both sides.

    How many: `rate` of the tokens that may be learned from, rounded up or down by chance so that the mean is exact
    (BERT rounds to the nearest, which is 3 % off where rows are equally long), and at least one a row.  Which: a random
    order keyed by the row; special tokens never.  The chosen ones are then dealt, in that order, to [MASK], to a random
    token (never a special one) and to themselves in the shares 80/10/10, exact to one token a row; so the pieces of a
    whole word mostly share their lot.
    """

    terms: ClassVar[tuple[str, ...]] = ("mlm",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    heads: ClassVar[tuple[str, ...]] = ("mlm",)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "labels", "weights")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    wants: ClassVar[str] = "text"

    kind: Literal["masked_lm"] = "masked_lm"
    rate: float = Field(0.15, gt=0, lt=1, allow_inf_nan=False, description="Share of the tokens to predict.")
    replace: float = Field(
        0.8, ge=0, le=1, allow_inf_nan=False, description="Share of the predicted tokens shown as [MASK].")
    random: float = Field(
        0.1, ge=0, le=1, allow_inf_nan=False, description="Share of them shown as a random token; the rest stay.")
    whole_word: bool = Field(False, description="Hide all pieces of a word together; a Chinese character is a word.")

    @model_validator(mode="after")
    def _shares(self) -> MaskedLM:
        if self.replace + self.random > 1 + 1e-9:
            total = self.replace + self.random
            raise ValueError(_("replace + random = {total:g} is more than 1; lower one of them").format(total=total))
        return self

    def tasks(self) -> tuple[Head, ...]:
        return ()

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 2

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, labels, weights (and positions, segments unless every row is one full document), [B, T]."""
        return to_batch(self.hide(wrap(rows, vocab, length), [r["key"] for r in rows], vocab, rng))

    def hide(self, columns: Columns, keys: Sequence[np.ndarray], vocab: Special, rng: Rng) -> Columns:
        """Return the columns with tokens hidden in `ids`, the hidden ones in `labels`, and weights 0 elsewhere."""
        (mask,) = needed(vocab, "mask")
        ids, given = columns["ids"], columns["weights"]
        plain = np.flatnonzero(~vocab.reserved)
        assert len(plain), "a vocabulary of special tokens only"
        chance, stand_in, lots = np.ones(ids.shape), np.zeros(ids.shape, np.int64), np.zeros((len(ids), 2, 1))
        for i, (key, n) in enumerate(zip(keys, (columns["segments"] > 0).sum(1), strict=True)):
            draw = rng(key, "mask")                                     # per row: its batch does not matter
            lots[i, :, 0], chance[i, :n] = draw.random(2), draw.random(n)
            stand_in[i, :n] = plain[draw.integers(len(plain), size=n)]
        free = ~vocab.reserved[ids] & (given != 0)
        order, before, size = self._deck(ids, free, chance, vocab)
        budget = self.rate * free.sum(1, keepdims=True)
        taken = ((before + lots[:, 0] * size < budget) | (before == 0)) & np.take_along_axis(free, order, 1)
        lot = (np.arange(ids.shape[1]) + lots[:, 1]) / np.maximum(taken.sum(1, keepdims=True), 1)

        chosen, dealt = np.empty_like(free), np.empty_like(chance)
        np.put_along_axis(chosen, order, taken, 1)
        np.put_along_axis(dealt, order, lot, 1)
        shown = np.where(dealt < self.replace, mask, np.where(dealt < self.replace + self.random, stand_in, ids))
        return dict(columns) | {
            "ids": np.where(chosen, shown, ids),
            "labels": np.where(chosen, ids, UNLEARNED),
            "weights": np.where(chosen, given, np.float32(0)),
        }

    def _deck(
        self, ids: np.ndarray, free: np.ndarray, chance: np.ndarray, vocab: Special
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (place, tokens that lie before its word, tokens of its word) of the shuffled words' tokens, [B, T].

        Tokens that are not free come last.  Without `whole_word` each token is a word.
        """
        begins = np.ones_like(free)
        if self.whole_word:
            begins[:, 1:] = vocab.starts[ids[:, 1:]] | ~free[:, 1:] | ~free[:, :-1]
        word = np.cumsum(begins.ravel()) - 1                            # [B*T], rows share no word
        first = np.flatnonzero(begins)
        score = np.where(free, chance.ravel()[first][word].reshape(ids.shape), np.inf)
        order = np.argsort(score, axis=1, kind="stable")                # stable: a word stays together
        word = np.take_along_axis(word.reshape(ids.shape), order, 1)
        size = np.bincount(word.ravel())[word]
        opens = np.ones_like(free)
        opens[:, 1:] = word[:, 1:] != word[:, :-1]
        before = np.maximum.accumulate(np.where(opens, np.arange(ids.shape[1]), 0), axis=1)
        return order, before, size

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: cross-entropy summed by weight."""
        scores = out["mlm"]
        return torch.stack([-(scores.logp * batch["weights"].flatten()[scores.index]).sum()])

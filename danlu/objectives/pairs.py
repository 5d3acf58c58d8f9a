"""Two stretches of text in one row, and what the model says of them: [CLS] A [SEP] B [SEP].

Next-sentence prediction (Devlin et al., 2019): does B follow A, or come from another document?  Sentence-order
prediction (Lan et al., 2020): do A and B stand in the order in which they were written?  Label 0: the text as written.
B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.errors import ConfigError
from danlu.nn.tasks import Head
from danlu.objectives.frame import Columns, needed, pad_id, to_batch
from danlu.objectives.protocol import Batch, Out, Rng, Row
from danlu.words import _


class Pair(NamedTuple):
    """A row as two stretches; `learn_*` are the weights of their tokens for a masked objective."""

    a: np.ndarray
    b: np.ndarray
    learn_a: np.ndarray
    learn_b: np.ndarray
    label: int
    weight: float       # 0 where nothing can be learned from the pair


class NextSentence(Model):
    """The model tells whether B follows A (0) or was drawn from another document (1), each in half of the rows.

    A row without a partner, or of one token, keeps its text and weighs 0.
    """

    terms: ClassVar[tuple[str, ...]] = ("nsp",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    heads: ClassVar[tuple[str, ...]] = ("nsp",)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "types")
    partner: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    wants: ClassVar[str] = "text"

    kind: Literal["next_sentence"] = "next_sentence"

    def tasks(self) -> tuple[Head, ...]:
        return ()

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 3

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, types [B, T], nsp, nsp_weights [B] (and positions, segments unless every row is full)."""
        return alone("nsp", [self.pair(r, vocab, rng) for r in rows], vocab, length)

    def pair(self, row: Row, vocab: Special, rng: Rng) -> Pair:
        """Return the row cut at a sentence's end, its second half exchanged for text of `other` in half of the cases.

        The stranger is cut to the length of the text it replaces, at a sentence's end if that text ended at one, so
        that neither length nor ending gives the answer away.
        """
        draw = rng(row["key"], "pair")
        true = _halves(row, vocab, draw)
        other = row["other"][_bare(row["other"], vocab)] if "other" in row else np.empty(0, np.int64)
        if not true.weight or not len(other):
            return true._replace(weight=0.0)
        if draw.random() >= 0.5:
            return true
        begin = _border(other, vocab, draw, max(0, len(other) - len(true.b)))
        stranger = other[begin : begin + len(true.b)]
        ends = np.flatnonzero(vocab.ends[stranger])
        if vocab.ends[true.b[-1]] and len(ends):
            stranger = stranger[: ends[-1] + 1]
        return true._replace(b=stranger, learn_b=np.ones(len(stranger), np.float32), label=1)

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["nsp_weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: cross-entropy of the two answers, summed by weight."""
        return choose(out["nsp"], batch["nsp"], batch["nsp_weights"])


class SentenceOrder(Model):
    """The model tells whether two stretches stand as written (0) or were exchanged (1), each in half of the rows.

    A row of one token weighs 0.
    """

    terms: ClassVar[tuple[str, ...]] = ("sop",)
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    heads: ClassVar[tuple[str, ...]] = ("sop",)
    inputs: ClassVar[tuple[str, ...]] = ("ids", "positions", "segments", "types")
    partner: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    wants: ClassVar[str] = "text"

    kind: Literal["sentence_order"] = "sentence_order"

    def tasks(self) -> tuple[Head, ...]:
        return ()

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        return length, 0, 3

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return ids, types [B, T], sop, sop_weights [B] (and positions, segments unless every row is full)."""
        return alone("sop", [self.pair(r, vocab, rng) for r in rows], vocab, length)

    def pair(self, row: Row, vocab: Special, rng: Rng) -> Pair:
        """Return the row cut at a sentence's end, its halves exchanged in half of the cases."""
        draw = rng(row["key"], "pair")
        true = _halves(row, vocab, draw)
        if not true.weight or draw.random() >= 0.5:
            return true
        return Pair(true.b, true.a, true.learn_b, true.learn_a, label=1, weight=1.0)

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return batch["sop_weights"].sum(dtype=torch.float64)[None]

    def loss(self, out: Out, batch: Batch) -> Tensor:
        """Return [1]: cross-entropy of the two answers, summed by weight."""
        return choose(out["sop"], batch["sop"], batch["sop_weights"])


def choose(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return [1]: the cross-entropy of `logits` [B, 2], summed by weight."""
    full = torch.promote_types(logits.dtype, torch.float32)
    return (functional.cross_entropy(logits.to(full), labels, reduction="none") * weights).sum()[None]


def alone(name: str, pairs: Sequence[Pair], vocab: Special, length: int) -> Batch:
    """Return the batch of a pair objective that is the only one."""
    columns = frame(pairs, vocab, length)
    del columns["weights"]
    return to_batch(columns | answers(name, pairs, np.ones(len(pairs), bool)))


def answers(name: str, pairs: Sequence[Pair], mine: np.ndarray) -> Columns:
    """Return the label and weight columns [B] called `name`; rows that are not `mine` weigh 0."""
    labels, weights = np.array([p.label for p in pairs]), np.array([p.weight for p in pairs], np.float32)
    return {name: np.where(mine, labels, 0), f"{name}_weights": np.where(mine, weights, np.float32(0))}


def frame(pairs: Sequence[Pair], vocab: Special, length: int) -> Columns:
    """Return [CLS] A [SEP] B [SEP] in columns ids, weights, segments, positions, types, all [B, T].

    Pairs that do not fit lose tokens from the longer stretch, A from its front and B from its back: the border stays.
    """
    cls, sep = needed(vocab, "cls", "sep")
    shape = (len(pairs), length)
    ids, weights = np.full(shape, pad_id(vocab), np.int64), np.zeros(shape, np.float32)
    segments, types = np.zeros(shape, np.int32), np.zeros(shape, np.int64)
    for i, pair in enumerate(pairs):
        a, b = _fit(len(pair.a), len(pair.b), length - 3)
        middle, end = a + 1, a + b + 2
        ids[i, 0], ids[i, middle] = cls, sep
        ids[i, 1:middle], weights[i, 1:middle] = pair.a[len(pair.a) - a :], pair.learn_a[len(pair.a) - a :]
        if b:
            ids[i, middle + 1 : end], weights[i, middle + 1 : end] = pair.b[:b], pair.learn_b[:b]
            ids[i, end], types[i, middle + 1 : end + 1] = sep, 1
        segments[i, : end + 1 if b else end] = 1
    positions = np.where(segments > 0, np.arange(length), 0)
    return {"ids": ids, "weights": weights, "segments": segments, "positions": positions, "types": types}


def _fit(a: int, b: int, room: int) -> tuple[int, int]:
    """Return the lengths after taking from the longer, from B where they are equal, until both fit."""
    if a + b <= room:
        return a, b
    if a <= b:
        a = min(a, (room + 1) // 2)
        return a, room - a
    b = min(b, room // 2)
    return room - b, b


def _halves(row: Row, vocab: Special, draw: np.random.Generator) -> Pair:
    """Return the row cut in two, as written."""
    if row["segments"][0] != row["segments"][-1]:
        raise ConfigError(
            _("sentence pairs need one document in a row, and rows here are packed"),
            fix=_("set pack: false, or leave next_sentence and sentence_order out of the objective"),
        )
    inner = _bare(row["ids"], vocab)
    ids, learn = row["ids"][inner], row["weights"][inner]
    cut = _border(ids, vocab, draw, len(ids) - 1) if len(ids) > 1 else len(ids)
    return Pair(ids[:cut], ids[cut:], learn[:cut], learn[cut:], label=0, weight=float(len(ids) > 1))


def _bare(ids: np.ndarray, vocab: Special) -> slice:
    """Return where the text lies between a [CLS] and a [SEP] that are there already."""
    left = int(len(ids) > 0 and ids[0] == vocab.cls)
    return slice(left, len(ids) - int(len(ids) > left and ids[-1] == vocab.sep))


def _border(ids: np.ndarray, vocab: Special, draw: np.random.Generator, latest: int) -> int:
    """Return where a sentence begins, one of 1..latest by chance; the middle where no sentence ends."""
    begins = np.flatnonzero(vocab.ends[ids[: max(0, latest)]]) + 1
    return int(begins[draw.integers(len(begins))]) if len(begins) else max(0, min((len(ids) + 1) // 2, latest))

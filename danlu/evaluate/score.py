"""A model's scores on whole documents: every token that can be predicted is predicted exactly once.

P pieces, B rows, T tokens of a row.  A document longer than a row is cut into pieces; a decoder's share one token: the
last of one is the first context of the next.  Documents come and go in windows: only their sums are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from danlu import chance
from danlu.data.tokenizer import Tokenizer
from danlu.evaluate.interval import Estimate, Floats, estimate, exponential
from danlu.objectives.protocol import Batch, Objective
from danlu.parallel import autocast

WINDOW = 512                                             # documents cut, sorted by length and scored together
TOKENS = 8192                                            # places of a batch, padding included
LOGITS = 1 << 26                                         # … and of an encoder's logits [B, T, V]
FEW = 10                                                 # with fewer documents, pieces are drawn in their place


class Document(NamedTuple):
    """One held-out text as ids [n]; `weights` [n] is None where every token counts."""

    ids: np.ndarray
    bytes: int                                           # of the text, UTF-8
    weights: np.ndarray | None = None
    where: str = ""                                      # file:line


@dataclass
class Tally:
    """Sums and counts of every piece, column by column, and what is known of every document."""

    document: list[int] = field(default_factory=list)    # [P] number of the document
    sums: dict[str, list[float]] = field(default_factory=dict)       # metric -> [P]
    counts: dict[str, list[float]] = field(default_factory=dict)
    bytes: list[int] = field(default_factory=list)       # [documents] bytes of the tokens that are predicted
    where: list[str] = field(default_factory=list)       # [documents] file:line
    tokens: int = 0                                      # read
    first: int = 0                                       # tokens that nothing stands before, so nothing predicts
    unknown: int = 0                                     # ids of unk: their text is lost, and cheap to "predict"
    partial: bool = False                                # some tokens do not count: bytes mean nothing

    def add(self, rows: Sequence[dict[str, Any]], found: Mapping[str, tuple[Floats, Floats]]) -> None:
        """Take in the sums and counts [B] of each metric for `rows`."""
        self.document += [int(row["documents"][0]) for row in rows]
        for name, (sums, counts) in found.items():
            self.sums.setdefault(name, []).extend(sums.tolist())
            self.counts.setdefault(name, []).extend(counts.tolist())

    @property
    def unit(self) -> str:
        """What the bootstrap draws: documents, or pieces where documents are few."""
        return "documents" if len(self.bytes) >= FEW else "pieces"

    def estimates(self) -> dict[str, Estimate]:
        """Return every figure with its interval."""
        result: dict[str, Estimate] = {}
        for name in self.sums:
            sums, counts = self._drawn(self.sums[name]), self._drawn(self.counts[name])
            result[name] = estimate(sums, counts)
            if name in ("loss", "mlm_loss"):
                result["perplexity" if name == "loss" else "mlm_perplexity"] = exponential(result[name])
            if name == "loss" and any(self.bytes) and not self.partial:
                result["bits_per_byte"] = estimate(sums / math.log(2), self._shared(np.array(self.bytes, float)))
        return result

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield for each document where it stands and its own figures; None where nothing of it counts."""
        owner, size = np.array(self.document, np.int64), len(self.bytes)
        counts = {name: np.bincount(owner, weights=self.counts[name], minlength=size) for name in self.sums}
        means = {name: np.bincount(owner, weights=self.sums[name], minlength=size) / np.maximum(counts[name], 1e-300)
                 for name in self.sums}
        for number in range(size):
            figures = {name: float(means[name][number]) if counts[name][number] else None for name in means}
            predicted = int(max((counts[name][number] for name in counts), default=0))
            yield {"doc_id": number, "where": self.where[number], "predicted": predicted,
                   "bytes": self.bytes[number], **figures}

    def _drawn(self, values: list[float]) -> Floats:
        """Return values [P] summed into what is drawn."""
        if self.unit == "pieces":
            return np.array(values)
        return np.bincount(self.document, weights=values, minlength=len(self.bytes)).astype(np.float64)

    def _shared(self, values: Floats) -> Floats:
        """Return values [documents], shared out over their pieces by tokens if pieces are drawn."""
        if self.unit == "documents":
            return values
        tokens, owner = np.array(self.counts["loss"]), np.array(self.document)
        return values[owner] * tokens / np.maximum(np.bincount(owner, weights=tokens, minlength=len(values))[owner], 1)


def score(model: nn.Module, tokenizer: Tokenizer, documents: Iterable[Document], objective: Objective, *, length: int,
          device: torch.device, precision: str = "fp32", seed: int = 0) -> Tally:
    """Return the tally of `model` on `documents`, in evaluation mode; the mode before is put back."""
    tally, training, special = Tally(), model.training, tokenizer.special
    room, _overlap, reserve = objective.room(length)
    beside = length - (room - reserve)                   # places beside a row's ids: -1 for the shift, 2 or 3 for marks
    most = TOKENS if "lm" in objective.heads else min(TOKENS, max(length, LOGITS // special.size))
    model.eval()
    try:
        for window in _windows(documents):
            rows = _cut(window, objective, tokenizer, length, tally)
            for batch_rows in _batches(rows, most):
                size = max(len(row["ids"]) for row in batch_rows) + beside
                made = objective.collate(batch_rows, special, lambda key, use: chance.generator(seed, use, key), size)
                batch = {name: column.to(device) for name, column in made.items()}
                with torch.no_grad(), autocast(precision, device):
                    tally.add(batch_rows, _measured(model, objective, batch))
    finally:
        model.train(training)
    return tally


def _windows(documents: Iterable[Document]) -> Iterator[list[Document]]:
    source = iter(documents)
    while window := list(islice(source, WINDOW)):
        yield window


def _cut(window: Sequence[Document], objective: Objective, tokenizer: Tokenizer, length: int,
         tally: Tally) -> list[dict[str, Any]]:
    """Return the rows of a window of documents, one piece each, and count what the tally must know."""
    special = tokenizer.special
    room, overlap, reserve = objective.room(length)
    step, rows = room - reserve - overlap, list[dict[str, Any]]()
    for document in window:
        number, ids = len(tally.bytes), document.ids
        weights = np.ones(len(ids), np.float32) if document.weights is None else document.weights
        tally.partial |= bool((weights != 1).any())
        tally.tokens += len(ids)
        tally.unknown += int((ids == special.unk).sum()) if special.unk is not None else 0
        bare = overlap > 0 and len(ids) > 0 and not special.reserved[ids[0]]
        tally.first += bare
        tally.where.append(document.where)
        tally.bytes.append(max(0, document.bytes - (len(tokenizer.pieces[int(ids[0])]) if bare else 0)))
        for piece, start in enumerate(range(0, max(1, len(ids) - overlap), step)):
            part = slice(start, start + step + overlap)
            if len(ids[part]) > overlap:
                rows.append({"ids": ids[part], "weights": weights[part], "segments": np.ones(len(ids[part]), np.int32),
                             "key": np.array([0, 0, number, piece]), "documents": np.array([number])})
    if objective.partner:
        _pair(rows)
    return rows


def _pair(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row a piece of another document of its window, if there is one, by the row's key."""
    owner = np.array([row["documents"][0] for row in rows])
    for row in rows:
        others = np.flatnonzero(owner != row["documents"][0])
        if len(others):
            row["other"] = rows[int(chance.generator(0, "partner", row["key"]).choice(others))]["ids"]


def _batches(rows: list[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of similar length together, at most `most` places a batch."""
    batch: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: -len(r["ids"])):
        if batch and len(batch[0]["ids"]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _measured(model: nn.Module, objective: Objective, batch: Batch) -> dict[str, tuple[Floats, Floats]]:
    """Return metric -> (sums, counts), each [B]."""
    inputs = {name: batch[name] for name in objective.inputs if name in batch}
    rows, tokens = batch["ids"].shape
    if "lm" in objective.heads:
        scores = model(**inputs)["lm"]
        weights = batch["weights"].flatten()[scores.index].double()
        row = scores.index // tokens
        return {"loss": (_by(row, -scores.logp.double() * weights, rows), _by(row, weights, rows))}
    out = model(**{name: column for name, column in inputs.items() if name not in ("labels", "weights")})
    found: dict[str, tuple[Floats, Floats]] = {}
    if "mlm" in objective.heads:
        index = batch["weights"].flatten().nonzero()[:, 0]
        label, even = batch["labels"].flatten()[index], torch.ones(len(index), device=index.device)
        found |= _answers("mlm", out["logits"].flatten(0, 1)[index], label, even, index // tokens, rows)
    for name in ("nsp", "sop"):
        if name in objective.heads:
            each = torch.arange(rows, device=batch[name].device)
            found |= _answers(name, out[name], batch[name], batch[f"{name}_weights"], each, rows)
    return found


def _answers(name: str, logits: Tensor, labels: Tensor, weights: Tensor, row: Tensor,  # noqa: PLR0917
             rows: int) -> dict[str, tuple[Floats, Floats]]:
    """Return loss and accuracy of `logits` [N, classes] against `labels` [N], summed into rows."""
    logp = torch.log_softmax(logits.float(), -1).gather(1, labels[:, None])[:, 0]
    right, counts = (logits.argmax(-1) == labels).double(), _by(row, weights.double(), rows)
    return {f"{name}_loss": (_by(row, -logp.double() * weights, rows), counts),
            f"{name}_accuracy": (_by(row, right * weights, rows), counts)}


def _by(row: Tensor, values: Tensor, rows: int) -> Floats:
    sums = torch.zeros(rows, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, row, values.double()).cpu().numpy()


"""What a frozen model says becomes columns of the batch, and to say the same a term of the loss (Li and Hoiem, 2016).

B rows, T tokens, K classes, N positions that are learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.tokenizer import Special
from danlu.nn.tasks import Head
from danlu.objectives.classify import full
from danlu.objectives.inside import Inside
from danlu.objectives.protocol import Batch, Objective, Out, Rng, Row
from danlu.objectives.tasks import Tasks

SURE = -1e-6                                             # log-probabilities of all ids but the rest are at most this


@dataclass(frozen=True)
class Distilled:
    """An objective with a term for each head that frozen models have, too: the mean divergence from what those say.

    kept: heads of classes, scores or tags.  text: the head of the vocabulary, of which the `top` likeliest ids of a frozen
    model are compared, and all others together: no more than the divergence over the whole vocabulary, and no logits of it.
    Text is compared on the rows of sources from number `old` on; empty: not at all.  learn: weight of the objective itself.
    inside: what of their inside is learned, too.
    """

    inner: Objective
    kept: tuple[Head, ...]
    text: str = ""
    old: int = 0
    weight: float = 1.0
    temperature: float = 2.0
    top: int = 32
    learn: float = 1.0
    inside: Inside | None = None
    kind: str = field(default="distilled", init=False)

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.inner.terms, *(f"distil/{head.name}" for head in self.kept), *(["distil/text"] if self.text else []),
                *(self.inside.terms if self.inside else ()))

    @property
    def scales(self) -> tuple[float, ...]:
        return (*[self.learn * scale for scale in self.inner.scales], *[self.weight] * (len(self.kept) + bool(self.text)),
                *(self.inside.scales if self.inside else ()))

    @property
    def heads(self) -> tuple[str, ...]:
        return self.inner.heads

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.inner.inputs, "candidates", "soften") if self.text else self.inner.inputs

    @property
    def partner(self) -> bool:
        return self.inner.partner

    @property
    def packs(self) -> bool:
        return self.inner.packs

    @property
    def wants(self) -> str:
        return self.inner.wants

    def tasks(self) -> tuple[Head, ...]:
        return self.inner.tasks()

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        raise AssertionError("the objective inside has met the data before")

    def room(self, length: int) -> tuple[int, int, int]:
        return self.inner.room(length)

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return what the objective inside does, distil/row_weights [B]: 1 for rows that heads of classes read; for text also
        distil/old [B]: 1 for rows that are compared, and soften [B]; for what is inside distil/real [B, T]: 1 for
        tokens that are no padding.
        """
        columns = self.inner.collate(rows, vocab, rng, length)
        if self.text:
            columns["distil/old"] = torch.tensor([float(row["key"][0] >= self.old) for row in rows])
            if self.temperature != 1:
                columns["soften"] = torch.full((len(rows),), self.temperature)
        if self.inside:
            there = columns.get("segments")
            columns["distil/real"] = torch.ones(columns["ids"].shape) if there is None else (there > 0).float()
        read = torch.ones(len(rows))
        if isinstance(self.inner, Tasks):
            parts = [columns[f"{name}/rows"] for name, part in self.inner.parts.items() if part.objective.tasks()]
            read = torch.stack(parts).sum(0) if parts else torch.zeros(len(rows))
        return {**columns, "distil/row_weights": read}

    @torch.no_grad()
    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        """Return the batch with what each frozen model says.

        Of model i there are distil/i/NAME [B, K] or [B, T, K] logits, and distil/i/text [B, T, k] log-probabilities of its
        likeliest ids; candidates [B, T, k·models] are those ids.  What they hold inside: see `Inside.columns`.
        """
        said: Batch = {}
        candidates = []
        for i, ask in enumerate(frozen.values()):
            out: Out = ask(batch, self.top if self.text else 0)
            said |= {f"distil/{i}/{head.name}": full(out[head.name]).float() for head in self.kept}
            said |= self.inside.columns(out, i) if self.inside else {}
            if self.text:
                best = out[f"{self.text}/best"]
                shape = (*batch["labels"].shape, best.ids.shape[1])
                for name, column in ((f"distil/{i}/text", best.logp), ("candidates", best.ids)):
                    whole = column.new_zeros(shape)
                    whole.view(-1, shape[-1])[best.index] = column
                    if name == "candidates":
                        candidates.append(whole)
                    else:
                        said[name] = whole
        return {**batch, **said, **({"candidates": torch.cat(candidates, -1)} if candidates else {})}

    def count(self, batch: Batch) -> Tensor:
        counts = [self._weights(head, batch).sum(dtype=torch.float64)[None] for head in self.kept]
        text = [(batch["weights"] * batch["distil/old"][:, None]).sum(dtype=torch.float64)[None]] if self.text else []
        return torch.cat([self.inner.count(batch), *counts, *text, *(self.inside.count(batch) if self.inside else [])])

    def loss(self, out: Out, batch: Batch) -> Tensor:
        models = 1 + max(int(name.split("/")[1]) for name in batch if name.startswith("distil/") and name.count("/") == 2)
        sums = []
        for head in self.kept:
            apart = [divergence(full(out[head.name]), batch[f"distil/{i}/{head.name}"], head, self.temperature)
                     for i in range(models)]
            sums.append((sum(apart[1:], apart[0]) / models * self._weights(head, batch)).sum())
        if self.text:
            index, parts = out[self.text].index, out[f"{self.text}/of"].chunk(models, -1)
            apart = [of_best(part, batch[f"distil/{i}/text"].flatten(0, 1)[index]) for i, part in enumerate(parts)]
            weights = (batch["weights"] * batch["distil/old"][:, None]).flatten()[index]
            sums.append((sum(apart[1:], apart[0]) / models * weights).sum() * self.temperature**2)
        sums += self.inside.loss(out, batch) if self.inside else []
        return torch.cat([self.inner.loss(out, batch), torch.stack(sums)])

    def _weights(self, head: Head, batch: Batch) -> Tensor:
        """Return 1 for each row [B] that a head of classes reads, or for each word [B, T] that has a tag."""
        if head.kind == "tag":
            return (batch[f"{head.name}/tags" if isinstance(self.inner, Tasks) else "tags"] >= 0).float()
        return batch["distil/row_weights"]


def plain(objective: Objective) -> Objective:
    """Return the objective without what is distilled."""
    return objective.inner if isinstance(objective, Distilled) else objective


def divergence(said: Tensor, by: Tensor, head: Head, temperature: float) -> Tensor:
    """Return [B], or [B, T]: KL(by || said) of logits [.., K] at `temperature`, times its square (Hinton et al., 2015).

    Of several labels a row, the mean of their binary divergences; of scores half their squared difference.
    """
    said, by = said.float(), by.float()
    if head.problem == "regression":
        return (said - by).square().mean(-1) / 2
    if head.problem == "multi":
        p, log = torch.sigmoid(by / temperature), F.logsigmoid
        there = p * (log(by / temperature) - log(said / temperature))
        return (there + (1 - p) * (log(-by / temperature) - log(-said / temperature))).mean(-1) * temperature**2
    mine, theirs = F.log_softmax(said / temperature, -1), F.log_softmax(by / temperature, -1)
    return (theirs.exp() * (theirs - mine)).sum(-1) * temperature**2


def of_best(said: Tensor, by: Tensor) -> Tensor:
    """Return [N]: the KL divergence of k ids, and of all others together, from log-probabilities [N, k] of both models."""
    return (by.exp() * (by - said)).sum(-1) + _rest(by).exp() * (_rest(by) - _rest(said))


def _rest(logp: Tensor) -> Tensor:
    """Return the log-probability [N] of what is not among the k ids."""
    return torch.log(-torch.expm1(logp.logsumexp(-1).clamp(max=SURE)))

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
from danlu.objectives.protocol import Batch, Objective, Out, Rng, Row
from danlu.objectives.tasks import Tasks

SURE = -1e-6                                             # log-probabilities nearer to 0 are taken for this


@dataclass(frozen=True)
class Distilled:
    """An objective with a term for each head that a frozen model has, too: the divergence from what that one says.

    kept: heads of classes, compared on every row of their kind.  text: the head of the vocabulary, compared on the rows of
    sources from number `old` on; empty: it is not.
    """

    inner: Objective
    kept: tuple[Head, ...]
    text: str = ""
    old: int = 0
    weight: float = 1.0
    temperature: float = 2.0
    kind: str = field(default="distilled", init=False)

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.inner.terms, *(f"distil/{head.name}" for head in self.kept), *(["distil/text"] if self.text else []))

    @property
    def scales(self) -> tuple[float, ...]:
        return (*self.inner.scales, *[self.weight] * (len(self.kept) + bool(self.text)))

    @property
    def heads(self) -> tuple[str, ...]:
        return self.inner.heads

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.inner.inputs

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
        """Return what the objective inside does, and distil/old [B]: 1 for replayed rows."""
        old = torch.tensor([float(row["key"][0] >= self.old) for row in rows])
        return {**self.inner.collate(rows, vocab, rng, length), "distil/old": old}

    @torch.no_grad()
    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        """Return the batch with distil/NAME [B, K] logits and distil/text [B, T] log-probabilities of the labels."""
        out: Out = frozen["start"](batch)
        said = {f"distil/{head.name}": out[head.name].float() for head in self.kept}
        if self.text:
            logp = torch.zeros(batch["labels"].numel(), device=batch["labels"].device)
            logp[out[self.text].index] = out[self.text].logp.float()
            said["distil/text"] = logp.view_as(batch["labels"])
        return {**batch, **said}

    def count(self, batch: Batch) -> Tensor:
        rows = self._rows(batch).sum(dtype=torch.float64)[None].expand(len(self.kept))
        text = [(batch["weights"] * batch["distil/old"][:, None]).sum(dtype=torch.float64)[None]] if self.text else []
        return torch.cat([self.inner.count(batch), rows, *text])

    def loss(self, out: Out, batch: Batch) -> Tensor:
        rows = self._rows(batch)
        sums = [(divergence(out[head.name], batch[f"distil/{head.name}"], head, self.temperature) * rows).sum()
                for head in self.kept]
        if self.text:
            scores = out[self.text]
            weights = (batch["weights"] * batch["distil/old"][:, None]).flatten()[scores.index]
            sums.append((of_label(scores.logp, batch["distil/text"].flatten()[scores.index]) * weights).sum())
        return torch.cat([self.inner.loss(out, batch), torch.stack(sums)])

    def _rows(self, batch: Batch) -> Tensor:
        """Return 1 for each row [B] that heads of classes read."""
        if not isinstance(self.inner, Tasks):
            return torch.ones(len(batch["ids"]), device=batch["ids"].device)
        return torch.stack([batch[f"{name}/rows"] for name, part in self.inner.parts.items() if part.objective.tasks()]).sum(0)


def plain(objective: Objective) -> Objective:
    """Return the objective without what is distilled."""
    return objective.inner if isinstance(objective, Distilled) else objective


def divergence(said: Tensor, by: Tensor, head: Head, temperature: float) -> Tensor:
    """Return [B]: KL(by || said) of logits [B, K] at `temperature`, times its square (Hinton et al., 2015).

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


def of_label(said: Tensor, by: Tensor) -> Tensor:
    """Return [N]: the KL divergence of label against all other tokens together, from log-probabilities of the label [N]."""
    said, by = said.clamp(max=SURE), by.clamp(max=SURE)
    return by.exp() * (by - said) - torch.expm1(by) * (_rest(by) - _rest(said))


def _rest(logp: Tensor) -> Tensor:
    return torch.log(-torch.expm1(logp))

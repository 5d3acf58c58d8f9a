"""What teachers hold inside is learned, too: the states of their blocks, and how their tokens relate to one another.

B rows, T tokens, D width, R relation heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.objectives.protocol import Batch, Out

PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Inside:
    """Terms for the states of blocks (TinyBERT; Jiao et al., 2019) and for relations (MiniLMv2; Wang et al., 2021).

    maps: for each teacher its block for each block of the student.  A token's state costs the mean squared difference over the
    width, or 1 - cosine; its relations the Kullback-Leibler divergence from the teacher's softmax(x·xᵀ/sqrt(d)) over the tokens
    that it sees, the mean over q, k and v of the last block and `heads` parts of their width.
    """

    maps: tuple[tuple[int, ...], ...]
    hidden: float = 0.0
    like: Literal["mse", "cosine"] = "mse"
    relations: float = 0.0
    heads: int = 1
    causal: bool = False

    @property
    def terms(self) -> tuple[str, ...]:
        return (*(["distil/hidden"] if self.hidden else []), *(["distil/relations"] if self.relations else []))

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(weight for weight in (self.hidden, self.relations) if weight)

    def columns(self, out: Out, teacher: int) -> Batch:
        """Return what teacher number `teacher` holds inside, as columns of the batch: [B, T, …] each."""
        blocks = {f"block{n}": f"block/{n}" for n in sorted(set(self.maps[teacher]))} if self.hidden else {}
        parts = {f"last-{part}": f"last/{part}" for part in PARTS} if self.relations else {}
        return {f"distil/{teacher}/{column}": out[name].float() for column, name in (blocks | parts).items()}

    def count(self, batch: Batch) -> list[Tensor]:
        """Return the number of tokens [1], float64, of each term; distil/real [B, T] is 1 for those that are no padding."""
        return [batch["distil/real"].sum(dtype=torch.float64)[None]] * len(self.terms)

    def loss(self, out: Out, batch: Batch) -> list[Tensor]:
        """Return the sum over tokens of each term, of several teachers the mean."""
        real, sums = batch["distil/real"], []
        if self.hidden:
            apart = [self._states(out, batch, i) for i in range(len(self.maps))]
            sums.append((sum(apart[1:], apart[0]) / len(self.maps) * real).sum())
        if self.relations:
            unseen = _unseen(batch, self.causal)
            apart = [self._relations(out, batch, i, unseen) for i in range(len(self.maps))]
            sums.append((sum(apart[1:], apart[0]) / len(self.maps) * real).sum())
        return sums

    def _states(self, out: Out, batch: Batch, teacher: int) -> Tensor:
        """Return how far the states of each token are from a teacher's, the mean over blocks [B, T]."""
        apart = []
        for mine, theirs in enumerate(self.maps[teacher]):
            said = out.get(f"probe/{teacher}/{mine}", out[f"block/{mine}"]).float()
            by = batch[f"distil/{teacher}/block{theirs}"]
            apart.append((said - by).square().mean(-1) if self.like == "mse" else 1 - F.cosine_similarity(said, by, dim=-1))
        return torch.stack(apart).mean(0)

    def _relations(self, out: Out, batch: Batch, teacher: int, unseen: Tensor) -> Tensor:
        """Return how far the relations of each token are from a teacher's [B, T]."""
        total = torch.zeros(unseen.shape[:2], device=unseen.device)
        for part in PARTS:
            mine = related(out[f"last/{part}"], self.heads, unseen)
            theirs = related(batch[f"distil/{teacher}/last-{part}"], self.heads, unseen)
            total = total + (theirs.exp() * (theirs - mine)).masked_fill(unseen[:, None], 0).sum(-1).mean(1)
        return total / len(PARTS)


def related(x: Tensor, heads: int, unseen: Tensor) -> Tensor:
    """Return [B, R, T, T] log softmax(x·xᵀ/sqrt(d)) of x [B, T, W] in `heads` parts of width d; unseen [B, T, T]: True is left
    out."""
    x = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)                # [B, R, T, d]
    scores = x @ x.mT / math.sqrt(x.shape[-1])
    return F.log_softmax(scores.masked_fill(unseen[:, None], torch.finfo(scores.dtype).min), -1)


def _unseen(batch: Batch, causal: bool) -> Tensor:
    """Return [B, T, T]: True for tokens that one does not see, of other documents, and where it is causal later ones."""
    rows, tokens = batch["ids"].shape
    unseen = torch.zeros(rows, tokens, tokens, dtype=torch.bool, device=batch["ids"].device)
    if "segments" in batch:
        unseen |= batch["segments"][:, :, None] != batch["segments"][:, None, :]
    return unseen | torch.ones_like(unseen).triu(1) if causal else unseen


def uniform(student: int, teacher: int) -> tuple[int, ...]:
    """Return the teacher's block for each of the student's: evenly spread, the last for the last (Jiao et al., 2019)."""
    return tuple(round((i + 1) * teacher / student) - 1 for i in range(student))

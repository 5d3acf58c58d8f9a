"""What a task reads off the last block: a class of a row, of each token, the ends of an answer, a vector of a text.

B rows, T tokens, D width, K classes, P stretches of a row.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from danlu.config import Model
from danlu.nn.drop import dropout
from danlu.words import _

Kind = Literal["classify", "tag", "answer", "choose", "embed"]
Problem = Literal["single", "multi", "regression"]


class Head(Model):
    """One task of a model: what it is called, what it reads, and the names of its classes."""

    kind: Kind = Field("classify", description="What is said: classify (a row), tag (each token), answer (first and last "
                       "token), choose (one of several stretches), embed (a vector of each stretch).")
    name: str = Field("", description="Name of the head; empty: its kind.")
    labels: tuple[str, ...] = Field((), description="Names of the classes, in the order of their numbers.")
    problem: Problem = Field("single", description="One class of several, any number of classes, or a score.")

    @model_validator(mode="after")
    def _named(self) -> Head:
        if not self.name:
            object.__setattr__(self, "name", self.kind)
        if self.name in ("lm", "mlm", "nsp", "sop") or hasattr(nn.ModuleDict(), self.name):
            raise ValueError(_("a head cannot be called {name}; choose another name").format(name=self.name))
        return self

    @property
    def size(self) -> int:
        """How many numbers the head gives for what it reads; 0: it has no weights."""
        if self.kind in ("classify", "tag"):
            return max(1, len(self.labels))
        return {"answer": 2, "choose": 1, "embed": 0}[self.kind]


Heads = Annotated[tuple[Head, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class TaskHead(nn.Module):
    """dropout, a dense layer where the family has one, dropout, and a linear layer."""

    def __init__(self, head: Head, width: int, *, dropout: float, bias: bool = True, dense: bool = False) -> None:
        super().__init__()
        self.kind = head.kind
        self.dropout = 0.0 if head.kind == "answer" else dropout
        self.dense = nn.Linear(width, width) if dense else None
        self.out = nn.Linear(width, head.size, bias=bias) if head.size else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., K] from x [..., D]; x itself where the head has no weights."""
        if self.out is None:
            return x
        if self.dense is not None:
            x = torch.tanh(self.dense(dropout(x, self.dropout, self.training)))
        return self.out(dropout(x, self.dropout, self.training))      # type: ignore[no-any-return]


def pooled(x: Tensor, segments: Tensor | None, stretches: int) -> Tensor:
    """Return the mean of x [B, T, D] over each stretch, [B, P, D]; stretch p is where `segments` [B, T] is p + 1."""
    if segments is None:
        return x.mean(1, keepdim=True)
    inside = (segments[:, None, :] == torch.arange(1, stretches + 1, device=x.device)[None, :, None]).to(x.dtype)    # [B, P, T]
    return inside @ x / inside.sum(-1, keepdim=True).clamp(min=1)

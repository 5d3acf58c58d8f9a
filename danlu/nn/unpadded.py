"""Rows without their padding: the real tokens of a batch one after the other, for all that looks at one token at a time.

Only attention sees the rows; it gets queries, keys and values in their places, and what it says is collected again.  So short
rows beside long ones cost what their tokens cost.  Attention, in turn, takes rows of like length together, where that saves
enough.  B rows, T tokens, N real ones among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORTH = 4096                                            # scores of a head that take as long as another part's calls
PARTS = 4


class Part(NamedTuple):
    """Rows of like length, whose tokens follow one another among the real ones."""

    chosen: Tensor                                      # [b] which rows
    extent: int                                         # of their tokens
    inside: Real                                        # where those stand in rows as short as these allow


class Real(NamedTuple):
    """Where the real tokens of a batch stand, those of one row after those of another."""

    places: Tensor                                      # [N] of [B · T]
    rows: int
    tokens: int
    parts: tuple[Part, ...] = ()                        # which attention takes one after the other; (): all at once

    def collect(self, x: Tensor) -> Tensor:
        """Return the real tokens [1, N, …] of x [B, T, …], or of x [1, T, …], which stands for every row."""
        if len(x) != self.rows:
            return x[0].index_select(0, self.places % self.tokens)[None]
        return _Collect.apply(x, self)                  # type: ignore[no-any-return, no-untyped-call]

    def spread(self, x: Tensor) -> Tensor:
        """Return x [1, N, …] in its places [B, T, …], 0 in all others."""
        return _Spread.apply(x, self)                   # type: ignore[no-any-return, no-untyped-call]


def real(segments: Tensor | None) -> Real | None:
    """Return where the real tokens are by `segments` [B, T], 0 for padding; None where there is none."""
    if segments is None:
        return None
    index = segments.flatten().nonzero()[:, 0]
    if len(index) in (0, segments.numel()):
        return None
    rows, tokens = segments.shape
    lengths = (segments != 0).sum(-1)
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    apart = cuts(sizes, lambda size: size**2, WORTH)
    column = torch.arange(tokens, device=segments.device)
    if not apart or bool((index % tokens >= lengths[index // tokens]).any()):     # what is not at a row's start
        return Real(index, rows, tokens)
    parts = []
    for first, last in itertools.pairwise([0, *apart, rows]):
        own = lengths[order[first:last], None] > column[: sizes[first]]
        parts.append(Part(order[first:last], sum(sizes[first:last]), Real(own.flatten().nonzero()[:, 0], *own.shape)))
    places = (order[:, None] * tokens + column)[lengths[order, None] > column]
    return Real(places, rows, tokens, tuple(parts))


def cuts(sizes: list[int], cost: Callable[[int], int], worth: int) -> list[int]:
    """Return where to cut rows, the longest first, into at most PARTS, so that the costs of each part's longest are least.

    cost: of a row padded to so many tokens; worth: what a further part has to save.
    """
    def halved(first: int, last: int) -> tuple[int, int]:
        saved = [(last - at) * (cost(sizes[first]) - cost(sizes[at])) for at in range(first + 1, last)]
        best = max(range(len(saved)), key=saved.__getitem__, default=0)
        return (saved[best], first + 1 + best) if saved else (0, first)

    found: list[int] = []
    while len(found) < PARTS - 1:
        saved, at = max(halved(first, last) for first, last in itertools.pairwise([0, *found, len(sizes)]))
        if saved <= worth:
            break
        found = sorted([*found, at])
    return found


def real_in(model: Any, segments: Tensor | None) -> Real | None:
    """Return what `real` does for a model that is to leave padding out; None where others need the rows whole."""
    if not model.unpadded or model.span is not None or model.strip.size > 1 or model.taps.listening:
        return None
    return real(segments)


def _collected(x: Tensor, where: Real) -> Tensor:
    return x.flatten(0, 1).index_select(0, where.places)[None]


def _spread(x: Tensor, where: Real) -> Tensor:
    flat = x.new_zeros(where.rows * where.tokens, *x.shape[2:]).index_copy_(0, where.places, x[0])
    return flat.view(where.rows, where.tokens, *x.shape[2:])


# each is the other's gradient; autograd would add up rows of which each comes once
class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Real) -> Tensor:
        ctx.where = where
        return _collected(x, where)

    @staticmethod
    @once_differentiable                                # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _spread(grad, ctx.where), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Real) -> Tensor:
        ctx.where = where
        return _spread(x, where)

    @staticmethod
    @once_differentiable                                # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _collected(grad, ctx.where), None

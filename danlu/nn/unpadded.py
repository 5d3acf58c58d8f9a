"""Rows without their padding: the real tokens of a batch one after the other, for all that looks at one token at a time.

Only attention sees the rows; it gets queries, keys and values in their places, and what it says is collected again.  So short
rows beside long ones cost what their tokens cost.  B rows, T tokens, N real ones among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Real(NamedTuple):
    """Where the real tokens of a batch stand."""

    places: Tensor                                      # [N] of [B · T]
    rows: int
    tokens: int

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
    return None if len(index) in (0, segments.numel()) else Real(index, *segments.shape)


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

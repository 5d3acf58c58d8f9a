"""Layers that compute with their weight rounded to few bits, while the weight itself learns (Jacob et al., 2017).

What is computed is what `forms` would pack and unpack, to the bit.  The gradient passes rounding as if it were not there
(straight through; Bengio et al., 2013).  O outputs, I inputs, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danlu.nn import placed
from danlu.nn.forms import Int4, Int8


class RoundedLinear(nn.Linear):
    """A linear layer that computes with `weight` in the form `form`."""

    form: Int8 | Int4

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        return F.linear(x, seen(self), self.bias)


class RoundedEmbedding(nn.Embedding):
    """A table of tokens whose rows are rounded, each by its own largest."""

    form: Int8

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., D] from ids [...]."""
        if placed.is_part(self.weight):                  # each process looks up ids of its own rows
            return F.embedding(ids, seen(self))
        rows = F.embedding(ids, self.weight)
        return straight(rows.flatten(0, -2), self.form).view_as(rows)


def become(layer: Any, form: Int8 | Int4) -> None:
    """Let a plain linear layer or embedding compute with its weight in `form`; its tensors stay what they are."""
    assert type(layer) in (nn.Linear, nn.Embedding), "a plain layer is rounded"
    layer.__class__ = RoundedEmbedding if isinstance(layer, nn.Embedding) else RoundedLinear
    layer.form = form


@torch.no_grad()
def settle(layer: Any) -> None:
    """Turn a rounded layer back into a plain one, whose weight is what it computed with."""
    layer.weight.copy_(seen(layer))
    layer.__class__ = nn.Embedding if isinstance(layer, nn.Embedding) else nn.Linear
    del layer.form


def is_rounded(layer: object) -> bool:
    """Return whether a layer computes with its weight rounded."""
    return isinstance(layer, RoundedLinear | RoundedEmbedding)


def seen(layer: Any) -> Tensor:
    """Return the matrix that a layer computes with, through which its weight learns."""
    return straight(layer.weight, layer.form) if is_rounded(layer) else layer.weight


def straight(weight: Tensor, form: Int8 | Int4) -> Tensor:
    """Return `weight` [O, I] rounded; its gradient is that of what is returned."""
    rounded: Tensor = _Straight.apply(weight, form)      # type: ignore[no-untyped-call]
    return rounded


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, form: Int8 | Int4) -> Tensor:
        if not placed.is_part(weight):
            return _rounded(weight, form)
        rows = all(placement.is_replicate() or placement.is_shard(0) for placement in weight.placements)
        part = _rounded(weight.to_local(), form) if rows else _rounded(weight.full_tensor(), form)[placed.extent(weight).slices]
        return placed.like(weight, part)                 # cut along its inputs, a row's scales are of all of them

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _rounded(weight: Tensor, form: Int8 | Int4) -> Tensor:
    scales = form.grid(weight)
    return form.value(form.nearest(weight, scales), scales).to(weight.dtype)

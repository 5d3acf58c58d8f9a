"""Penalties on how far weights have moved, as gradients added before clipping; and the Fisher information that weighs them.

Every process handles the part of each parameter that it trains; a value counts each element once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from danlu.objectives.protocol import Batch
from danlu.parallel.place import Leaf
from danlu.train.step import Engine


class Pull:
    """½ Σ w (θ - θ₀)², where θ₀ is where `leaves` are when this is made.

    weight: of each leaf a number or a tensor like its part; towards: whether it is pulled to θ₀, or else to 0.
    """

    def __init__(self, leaves: Sequence[Leaf], weight: Callable[[Leaf], Tensor | float], *,
                 towards: Callable[[Leaf], bool] = lambda leaf: True) -> None:
        self.weights = [weight(leaf) for leaf in leaves]
        self.start = [leaf.local.detach().clone() if towards(leaf) else None for leaf in leaves]

    @torch.no_grad()
    def add(self, leaves: Sequence[Leaf]) -> Tensor:
        """Add w (θ - θ₀) to the gradients; return this process's share of the value, float64."""
        total = torch.zeros((), dtype=torch.float64)
        for leaf, weight, start in zip(leaves, self.weights, self.start, strict=True):
            if leaf.local.grad is None or (isinstance(weight, float) and not weight):
                continue
            move = leaf.local.detach() if start is None else leaf.local.detach() - start
            pull = move * weight
            leaf.local.grad.add_(pull)
            total += torch.dot(move.flatten().double(), pull.flatten().double()).cpu() / (2 * leaf.copies)
        return total


def fisher(engine: Engine, rows: Iterable[Batch]) -> list[Tensor]:
    """Return the diagonal of the empirical Fisher information of each leaf: the mean of squared gradients, row by row.

    rows: batches in which one row counts, the same in every process.  The gradient is that of the row's mean loss, so that
    a long text weighs no more than a short one, without dropout.
    """
    model, leaves = engine.placed, engine.leaves
    squares, number, training = [torch.zeros_like(leaf.local) for leaf in leaves], 0, model.training
    model.eval()
    for batch in rows:
        engine.forward_backward(batch, step=number)
        engine.gather()
        for leaf, total in zip(leaves, squares, strict=True):
            if leaf.local.grad is not None:
                total.addcmul_(leaf.local.grad, leaf.local.grad)
            leaf.param.grad = leaf.local.grad = None
        number += 1
    model.train(training)
    return [total.div_(max(1, number)) for total in squares]

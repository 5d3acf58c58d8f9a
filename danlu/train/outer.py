"""Replicas that step alone, and what they do when they meet: an outer step on the mean of their moves.

DiLoCo (Douillard et al., 2023): each replica takes H steps of the inner optimizer on its own rows; the mean of
(where they began - where they are) is the gradient of SGD with Nesterov momentum.  The inner optimizer's moments are
averaged, too (the `average` of SlowMo; Wang et al., 2020), so that after each meeting the replicas are one state, which a
checkpoint can hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu.layout import Local
from danlu.parallel import World
from danlu.parallel.place import Leaf

SLOT = "outer"                                           # of the optimizer's state: the outer momentum travels with it


class Outer:
    """The outer step of `leaves`, which are equal in all replicas when this is made."""

    def __init__(self, local: Local, leaves: Sequence[Leaf], world: World) -> None:
        self.local, self.leaves, self.world = local, leaves, world
        self.anchors = [leaf.local.detach().clone() for leaf in leaves]

    def due(self, step: int, total: int, stopping: bool) -> bool:
        """Return whether the replicas meet after `step` steps: in time, at the end, and before a save that was asked for."""
        return step % self.local.steps == 0 or step == total or stopping

    @torch.no_grad()
    def meet(self, optimizer: Optimizer) -> None:
        """Move every replica to the same new place."""
        for anchor, leaf in zip(self.anchors, self.leaves, strict=True):
            state = optimizer.state[leaf.local]
            move = self._mean(anchor - leaf.local)
            if not state and not move.any():             # all updates were skipped: an optimizer begins with an empty state
                continue
            velocity = state.setdefault(SLOT, torch.zeros_like(anchor))
            velocity.mul_(self.local.momentum).add_(move)
            anchor.sub_(move.add_(velocity, alpha=self.local.momentum), alpha=self.local.lr)
            leaf.local.copy_(anchor)
            for name, value in state.items():
                if name != SLOT and isinstance(value, Tensor) and value.ndim:
                    self._mean(value)

    def _mean(self, tensor: Tensor) -> Tensor:
        return self.world.add(tensor, ("dp",)).div_(self.world.layout.dp)

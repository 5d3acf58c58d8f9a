"""Weights that are 0 while a run goes on, under every layout.

A zero stays a zero: its gradient is taken away before gradients are clipped, and what the optimizer makes of it afterwards.
So the weights themselves say which these are; a checkpoint holds nothing beside, and a resumed run goes on the same.
O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu.adapt.targets import linears
from danlu.compress import prune
from danlu.models.build import Config, build
from danlu.nn import placed
from danlu.parallel import World
from danlu.parallel.place import Leaf
from danlu.train.sparsify import HALF, KeepZeros, Magnitude, Sparsify, share

BITS = 31                                                # of a float32's magnitude, in whose order its bits are


class Zeros:
    """The zeros of the matrices of `cfg` that `how` means, in this process's `leaves`.  total: updates of the run."""

    def __init__(self, how: Sparsify, cfg: Config, leaves: Sequence[Leaf], world: World, *, total: int) -> None:
        self.how, self.world, self.total = how, world, total
        names = meant(how, cfg)
        self.leaves = [leaf for leaf in leaves if leaf.name in names]
        self.masks = [torch.empty(0)] * len(self.leaves)
        self.changed = False                             # more became 0 in the last step
        self.share = self.counted()                      # of the weights are 0, over all processes

    @torch.no_grad()
    def hold(self) -> None:
        """Take away the gradients of what is 0, and remember which that is, until `settle`."""
        self.masks = [leaf.local != 0 for leaf in self.leaves]
        for leaf, mask in zip(self.leaves, self.masks, strict=True):
            if leaf.local.grad is not None:
                leaf.local.grad.mul_(mask)

    @torch.no_grad()
    def settle(self, optimizer: Optimizer, step: int) -> None:
        """Let what was 0 be 0 again after update number `step` (from 1), and more if it is time; in its state, too."""
        for leaf, mask in zip(self.leaves, self.masks, strict=True):
            leaf.local.mul_(mask)
        self.changed = False
        wanted = None if isinstance(self.how, KeepZeros) else share(self.how, step, self.total)
        if wanted is None:
            return
        least = self._border(wanted) if isinstance(self.how, Magnitude) and self.how.over == "model" else None
        for leaf in self.leaves:
            stay = leaf.local.abs().float() > least if least is not None else self._stay(leaf, wanted)
            leaf.local.mul_(stay)
            for value in optimizer.state.get(leaf.local, {}).values():
                if isinstance(value, Tensor) and value.shape == stay.shape:
                    value.mul_(stay)
        self.changed, self.share = True, self.counted()

    @torch.no_grad()
    def of_average(self, average: Mapping[str, Tensor]) -> None:
        """Let averages of the weights, by name, be 0 where these are."""
        for leaf in self.leaves:
            average[leaf.name].mul_(leaf.local != 0)

    def counted(self) -> float:
        """Return the share of the weights that are 0; asked by all processes together."""
        zeros = [[float((leaf.local == 0).sum()) / leaf.copies, leaf.local.numel() / leaf.copies] for leaf in self.leaves]
        total = self.world.add(torch.tensor(zeros, dtype=torch.float64).reshape(-1, 2).sum(0))
        return float(total[0] / total[1].clamp(min=1))

    def _stay(self, leaf: Leaf, wanted: float) -> Tensor:
        """Return which weights of this process's part stay, of the whole matrix all but the share that is `wanted`."""
        whole = placed.whole(leaf.param)                 # [O, I]; the same in every process, and so is what is found
        score = whole.abs()
        if not isinstance(self.how, Magnitude):
            score = score.masked_fill(prune.two_of_four(score), torch.inf)
            wanted = wanted / HALF * float(score.isfinite().sum()) / score.numel()
        return prune.without(score, round(wanted * score.numel()))[placed.extent(leaf.param).slices]

    def _border(self, wanted: float) -> float:
        """Return the magnitude of which `wanted` of all weights have no larger one.  Of equal ones none stays.

        Found bit by bit: all processes count, none needs to see all weights, nor to sort them.
        """
        counted = [(leaf.local.abs().float().view(torch.int32), leaf.copies) for leaf in self.leaves]
        sizes = torch.tensor([sum(bits.numel() / copies for bits, copies in counted)], dtype=torch.float64)
        goal = round(wanted * float(self.world.add(sizes)))
        found = 0                                        # the largest magnitude, as bits, that fewer than `goal` are below
        for bit in reversed(range(BITS)):
            below = sum(float((bits < found | 1 << bit).sum()) / copies for bits, copies in counted)
            if round(float(self.world.add(torch.tensor([below], dtype=torch.float64)))) < goal:
                found |= 1 << bit
        return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))


def meant(how: Sparsify, cfg: Config) -> set[str]:
    """Return the names of the weights of the model that `how` means.  ConfigError for a layer that is not there."""
    model = build(cfg)
    keep, also = ((), ("*",)) if isinstance(how, KeepZeros) else (how.keep, how.also)
    return {f"{name}.weight" for name in linears(model, keep=keep, also=also, where="sparsify.")}

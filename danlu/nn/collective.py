"""What layers exchange with other processes when a row or the vocabulary is cut over them; gradients included.

The collectives are PyTorch's.  A sum whose result every process uses alike has the identity for a gradient: each process
then computes the same loss, and the gradient of its own summand is that of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from danlu.nn import placed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Span(NamedTuple):
    """Context parallelism: which tokens of every row this process has."""

    mine: Tensor                    # [t] their places in the row
    order: Tensor                   # [T] the places of all tokens, in the order in which `gather` puts them
    group: dist.ProcessGroup

    def gather(self, x: Tensor) -> Tensor:
        """Return [B, T, …] from every process's x [B, t, …]; the gradient of each token is summed over the processes."""
        whole: Tensor = _Gathered.apply(x, self.group)                      # type: ignore[no-untyped-call]
        return whole


    def whole(self, x: Tensor) -> Tensor:
        """Return [B, T, …] as `gather`, but in the order of the row."""
        return self.gather(x).index_select(1, self.order.argsort())


class Cut(NamedTuple):
    """A vocabulary of which this process has the ids from `first` on."""

    first: int
    size: int                       # of the whole vocabulary
    group: dist.ProcessGroup

    def add(self, x: Tensor) -> Tensor:
        """Return x summed over the processes, in place, without a gradient."""
        dist.all_reduce(x, group=self.group)
        return x

    def most(self, x: Tensor) -> Tensor:
        """Return the largest x of the processes, in place, without a gradient."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, x: Tensor) -> Tensor:
        """Return x summed over the processes; the gradient of each summand is that of the sum."""
        out: Tensor = _Total.apply(x, self.group)                           # type: ignore[no-untyped-call]
        return out


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _process in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = [part.contiguous() for part in grad.chunk(ctx.group.size(), 1)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def cut(weight: Tensor) -> tuple[Tensor, Cut | None]:
    """Return this process's rows of `weight` [V, …] and where they lie; None where it has them all."""
    if not placed.is_part(weight):
        return weight, None
    return weight.to_local(), Cut(placed.extent(weight).offset[0], weight.shape[0], weight.device_mesh.get_group())


def gathered(x: Tensor, weight: Tensor) -> Tensor:
    """Return [..., W] of x [..., w], of which each process has the part that its rows of `weight` made.

    What follows must be the same in every process: the gradient of a part is what it is in its own.
    """
    if not placed.is_part(weight):
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(x, weight.device_mesh, [Shard(x.ndim - 1)], run_check=False).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Replicate()])


class Strip:
    """Sequence parallelism: between blocks a process of a tensor-parallel group has only its strip of the tokens."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.size = 1 if mesh is None else mesh.size()

    def cut(self, x: Tensor) -> Tensor:
        """Return this process's tokens of x [B, T, D], which every process has alike."""
        return x if self.mesh is None else self._moved(x, None, 1)

    def join(self, x: Tensor) -> Tensor:
        """Return all tokens [B, T, D]; what follows must be the same in every process."""
        return x if self.mesh is None else self._moved(x, 1, None)

    def _moved(self, x: Tensor, now: int | None, then: int | None) -> Tensor:
        """Return x [B, T, D], cut along dimension `now`, cut along `then`; None is not cut."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        before, after = (Replicate() if dim is None else Shard(dim) for dim in (now, then))
        whole = DTensor.from_local(x, self.mesh, [before], run_check=False).redistribute(placements=[after])
        return whole.to_local(grad_placements=[after])


def numbered(blocks: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield (number in the whole model, block) of those that are here."""
    for name, block in blocks.named_children():
        yield int(name), block

"""Tensors of which a process may hold a part (DTensor), and plain ones, by the same few functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Extent(NamedTuple):
    """Where the part that a process holds lies in the whole tensor."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process holds, without autograd; it shares memory."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def extent(tensor: Tensor) -> Extent:
    """Return where the local part lies."""
    whole = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Extent(whole, (0,) * len(whole), whole)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Extent(whole, tuple(offset), tuple(shape))


def cuts(tensor: Tensor) -> int:
    """Return how many processes the tensor is cut over; each of the others in its mesh has a copy."""
    count = 1
    if isinstance(tensor, DTensor):
        for number, placement in enumerate(tensor.placements):
            count *= 1 if isinstance(placement, Replicate) else tensor.device_mesh.size(number)
    return count


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """Return `part` as what this process holds of a tensor placed like `tensor`; `part` itself where that is plain."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
                              stride=tensor.stride())


@torch.no_grad()
def fill(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Copy into `tensor` its part of the whole that `make` returns."""
    held = local(tensor)
    if held.numel():
        held.copy_(make()[extent(tensor).slices])

"""Tensors of which a process may hold a part (DTensor), and plain ones, by the same few functions.

PyTorch's module of DTensor takes seconds to import, and a process that is alone has none: it is asked for only where one
can be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Extent(NamedTuple):
    """Where the part that a process holds lies in the whole tensor."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))


def is_part(tensor: object) -> TypeGuard[DTensor]:
    """Return whether `tensor` is a DTensor; if their module is not imported yet, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process holds, without autograd; it shares memory."""
    held = tensor.detach()
    return held.to_local() if is_part(held) else held


def extent(tensor: Tensor) -> Extent:
    """Return where the local part lies."""
    whole = tuple(tensor.shape)
    if not is_part(tensor):
        return Extent(whole, (0,) * len(whole), whole)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Extent(whole, tuple(offset), tuple(shape))


def cuts(tensor: Tensor) -> int:
    """Return how many processes the tensor is cut over; each of the others in its mesh has a copy."""
    count = 1
    if is_part(tensor):
        for number, placement in enumerate(tensor.placements):
            count *= 1 if placement.is_replicate() else tensor.device_mesh.size(number)
    return count


def like(whole: Tensor, part: Tensor) -> Tensor:
    """Return `part` as what this process holds of a tensor placed like `whole`; `part` itself where that is plain.

    On whatever device it lies: `DTensor.from_local` would move it to the mesh's.
    """
    if not is_part(whole):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(whole.shape, whole.stride(), part.dtype)
    return DTensor(part.detach().contiguous(), DTensorSpec(whole.device_mesh, whole.placements, tensor_meta=meta),
                   requires_grad=False)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all of `tensor`, of which each process may hold a part; then all of them must ask for it together."""
    return tensor.full_tensor() if is_part(tensor) else tensor.detach()


@torch.no_grad()
def fill(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Copy into `tensor` its part of the whole that `make` returns."""
    held = local(tensor)
    if held.numel():
        held.copy_(make()[extent(tensor).slices])

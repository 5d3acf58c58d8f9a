"""A frozen base in few bits, in a trace: its matrices are not there, and unpacking one takes memory for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from danlu.adapt.quantize import Bits, PackedLinear
from danlu.nn.collective import numbered
from danlu.rehearse.ledger import changed
from danlu.train.recipe import Run

tracing = import_module("danlu.rehearse.trace")          # danlu.rehearse.trace by itself is the function of that name

# Bytes of an element: nf4 has 4 bits, an 8-bit scale for 64 of them, and scales of 256 scales; int8 a scale for each row
BYTES: dict[Bits, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


class _Packed:
    """Stands for a matrix [O, I] in few bits."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.shape, dtype=torch.float32).to(dtype)


def bits(run: Run) -> Bits | None:
    """Return in what the run keeps the matrices that it does not train, None if in full."""
    return getattr(run.adapt, "base", None)


@contextmanager
def packed(run: Run) -> Iterator[list[int]]:
    """Let traces of `run` find its base packed; yield the bytes that each trace's matrices take so, one after the other."""
    kind, sizes, plain = bits(run), list[int](), tracing.placed_as

    def placed_as(of: Run, world: Any) -> Any:
        made = plain(of, world)
        sizes.append(sum(_pack(part) for part in made.parts))
        return made

    with changed(tracing, "placed_as", plain if kind is None else placed_as):
        yield sizes
    sizes[:] = [round(size * BYTES[kind]) for size in sizes] if kind is not None else []


def _pack(part: Any) -> int:
    """Take the frozen matrices out of a model's blocks; return how many elements they had."""
    count = 0
    for _number, block in numbered(part.blocks):
        for module in block.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                shape = module.weight.shape
                count += shape.numel()
                module.register_parameter("weight", None)
                if type(module) is nn.Linear:
                    module.__class__ = PackedLinear
                module.__dict__["packed"] = _Packed(shape)
    return count

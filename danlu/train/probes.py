"""What makes the states of a student as wide as a teacher's: a matrix for each such teacher, learned with the student.

It is no part of the model.  Every process has it whole, and it lies with the optimizer's state in a checkpoint.
B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from danlu import chance
from danlu.parallel import World
from danlu.parallel.place import Leaf

SLOT = "weight"                                          # of the optimizer's state: so it is saved, and read again


class Probes:
    """Matrices from the student's width to `widths`, those of teachers by number; all blocks of a teacher share one."""

    def __init__(self, width: int, widths: Mapping[int, int], world: World, *, seed: int) -> None:
        self.world, self.matrices = world, dict[int, nn.Parameter]()
        for teacher, wide in widths.items():
            source = torch.Generator().manual_seed(chance.torch_seed(seed, f"init/distil.{teacher}"))
            made = torch.randn(wide, width, generator=source) / width**0.5
            self.matrices[teacher] = nn.Parameter(made.to(world.device))

    def __call__(self, out: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the student says, and the states of its blocks as wide as each teacher's: probe/TEACHER/BLOCK."""
        blocks = {name.removeprefix("block/"): x for name, x in out.items() if name.startswith("block/")}
        return {**out, **{f"probe/{teacher}/{number}": F.linear(x, matrix)
                          for teacher, matrix in self.matrices.items() for number, x in blocks.items()}}

    def leaves(self) -> list[Leaf]:
        """Return the matrices as what every process trains alike."""
        return [Leaf(f"distil.{teacher}", matrix, matrix, self.world.size) for teacher, matrix in self.matrices.items()]

    def gather(self, averaged: int) -> None:
        """Sum the gradients over the processes with other rows or tokens.  averaged: what they were multiplied by before."""
        for matrix in self.matrices.values():
            if matrix.grad is not None and self.world.layout.local is None:
                self.world.add(matrix.grad, ("dp", "cp")).div_(averaged)

    def stow(self, optimizer: Optimizer) -> None:
        """Let the matrices be saved with the optimizer's state, once it has any."""
        for matrix in self.matrices.values():
            if optimizer.state.get(matrix):
                optimizer.state[matrix][SLOT] = matrix.data

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Take the matrices out of a state that was read."""
        for matrix in self.matrices.values():
            if SLOT in optimizer.state.get(matrix, {}):
                matrix.copy_(optimizer.state[matrix][SLOT])

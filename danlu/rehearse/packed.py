"""A base in few bits, on fake tensors: the sizes that bitsandbytes would give it, without its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danlu.adapt import quantize
from danlu.nn.collective import numbered

BLOCK, NESTED = 64, 256                                  # weights that share a scale; scales that share one


def packed(weight: Tensor, kind: quantize.Bits) -> quantize.Packed:
    """Return a matrix as bitsandbytes packs it, of the same sizes and without its numbers."""
    size = weight.numel()
    if kind == "int8":
        return quantize.Packed(kind, torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight)), weight.shape)
    scales = torch.empty(-(-size // BLOCK), dtype=torch.uint8), torch.empty(-(-size // BLOCK // NESTED))
    return quantize.Packed(kind, torch.empty(-(-size // 2), dtype=torch.uint8), scales, weight.shape)


def unpacked(self: quantize.Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stand in for Packed.dense: the matrix, and what it takes to make it."""
    if self.kind == "nf4":
        torch.empty(-(-self.shape.numel() // BLOCK))
    return torch.empty(self.shape).to(dtype)


def packable(part: Any) -> list[torch.nn.Linear]:
    """Return the linear layers of a model's blocks that a base in few bits packs."""
    return [module for _number, block in numbered(part.blocks) for module in block.modules()
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad]

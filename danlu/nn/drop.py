"""Dropout (Srivastava et al., 2014) with cheap random numbers on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.nn import placed

STEPS = 1 << 16                     # a chance is a whole number of these parts: 0.1 is 6554/65536, and is scaled so


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """Return x with `share` of its elements set to 0 and the others scaled up, as F.dropout; x itself when not training.

    PyTorch's CPU kernel draws a 32-bit number an element, one after the other; here four are cut from one draw.
    """
    if not training or share <= 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or placed.is_part(x):
        return F.dropout(x, share, True)
    return x * mask(x, share)


def mask(like: Tensor, share: float) -> Tensor:
    """Return a tensor shaped like `like`: 0 for `share` of the elements, and what scales the others up."""
    size, parts = like.numel(), min(STEPS - 1, round(share * STEPS))
    drawn = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:size]
    return (drawn >= parts - STEPS // 2).view(like.shape).to(like.dtype).mul_(STEPS / (STEPS - parts))

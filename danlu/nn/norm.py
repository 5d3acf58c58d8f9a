"""Normalisation over the last dimension.  LayerNorm is torch's own; this is the one that it writes slowly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 whatever the input is (Zhang & Sennrich, 2019)."""

    def __init__(self, width: int, eps: float, *, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and type of `x` [..., D]."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

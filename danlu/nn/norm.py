"""Normalisation over the last dimension.  LayerNorm is torch's own; this is the one that it writes slowly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 at least (Zhang & Sennrich, 2019)."""

    def __init__(self, width: int, eps: float, *, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and type of `x` [..., D]."""
        full = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(full), self.weight.shape, self.weight.to(full), self.eps).to(x.dtype)

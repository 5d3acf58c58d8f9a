"""The feed-forward half of a block: up, activation, down; gated or not.

N tokens, D width, F hidden width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"]
_C, _A = 2 * math.sqrt(2 / math.pi), 0.044715


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated (Shazeer, 2020)."""

    def __init__(self, width: int, hidden: int, *, activation: Activation, gated: bool = False, bias: bool = False,
                 device: str | torch.device | None = None) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.path = "torch"
        self.up = nn.Linear(width, hidden, bias=bias, device=device)
        self.gate = nn.Linear(width, hidden, bias=bias, device=device) if gated else None
        self.down = nn.Linear(hidden, width, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor shaped like x [..., D]."""
        up = self.up(x)                                         # [..., F]
        if self.gate is None:
            return self.down(activate(up, self.activation, self.path))                  # type: ignore[no-any-return]
        return self.down(activate(self.gate(x), self.activation, self.path) * up)       # type: ignore[no-any-return]


def activate(x: Tensor, activation: Activation, path: str = "torch") -> Tensor:
    """Return activation(x); `path` matters to gelu_tanh alone."""
    if activation == "gelu_tanh":
        return gelu_tanh(x, path)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "silu":
        return F.silu(x)
    return F.relu(x) if activation == "relu" else F.relu(x).square()


def gelu_tanh(x: Tensor, path: str) -> Tensor:
    """Return x/2·(1 + tanh(sqrt(2/pi)(x + 0.044715x³))), by torch's kernel or as x·sigmoid of twice the argument."""
    if path == "torch":
        return F.gelu(x, approximate="tanh")
    return _SigmoidGelu.apply(x)                                # type: ignore[no-any-return, no-untyped-call]


class _SigmoidGelu(torch.autograd.Function):
    """(1 + tanh u)/2 = sigmoid(2u): the same function, and on a CPU a sigmoid takes less than a tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid_(_inner(x))
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        slope = (x * x).mul_(3 * _A * _C).add_(_C).mul_(x)      # x·d(2u)/dx
        slope.mul_(1 - gate).add_(1).mul_(gate)                 # gate·(1 + x·2u'·(1 - gate))
        out: Tensor = slope.mul_(grad)
        return out


def _inner(x: Tensor) -> Tensor:
    """Return 2u = 2·sqrt(2/pi)·(x + 0.044715x³), a new tensor."""
    return (x * x).mul_(_A * _C).add_(_C).mul_(x)

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
SLAB = 1 << 16      # elements; a quarter of a megabyte in float32
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
        self.after: nn.Module | None = None                     # what an adapter makes of the output

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor shaped like x [..., D]."""
        inner = self.up(x)                                      # [..., F]
        if self.gate is None:
            inner = activate(inner, self.activation, self.path)
        else:
            inner = activate(self.gate(x), self.activation, self.path) * inner
        out = self.down(inner)
        return out if self.after is None else self.after(out)                           # type: ignore[no-any-return]


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
    if torch.compiler.is_compiling():                           # the compiler fuses this by itself
        return x * torch.sigmoid((x * x * (_A * _C) + _C) * x)
    out: Tensor = _SigmoidGelu.apply(x, torch.is_grad_enabled() and x.requires_grad)                         # type: ignore[no-untyped-call]
    return out


class _SigmoidGelu(torch.autograd.Function):
    """(1 + tanh u)/2 = sigmoid(2u).  The slope is made along with the value, and kept in place of x.

    On a CPU both are made slab by slab: light passes over what is in the cache beat one heavy pass over what is not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, learning: bool) -> Tensor:
        flat = x.contiguous().view(-1)
        out, slope = torch.empty_like(flat), torch.empty_like(flat) if learning else None
        for start in range(0, len(flat), SLAB if x.device.type == "cpu" else max(1, len(flat))):
            here = slice(start, start + SLAB) if x.device.type == "cpu" else slice(None)
            piece = flat[here].to(torch.promote_types(x.dtype, torch.float32))
            double = torch.addcmul(piece.new_full((), _C), piece, piece, value=_A * _C).mul_(piece)     # 2u
            gate = torch.sigmoid(double)
            torch.mul(piece, gate, out=out[here])
            if slope is not None:                               # gate + x·(2u)'·gate·(1 - gate), and x·(2u)' = 6u - 2cx
                rest = torch.ops.aten.sigmoid_backward(double.add_(piece, alpha=-2 * _C / 3), gate)
                torch.add(gate, rest, alpha=3, out=slope[here])
        if slope is not None:
            ctx.save_for_backward(slope.view(x.shape))
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None

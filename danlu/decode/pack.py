"""Weights laid out for writing on a CPU, where each token costs one reading of all weights.

In bfloat16 the matrices are kept as the library wants them, which it would otherwise bring about at every product; in 8 bits
there is half as much to read.  B rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu.errors import ConfigError
from danlu.models.decoder import DecoderModel
from danlu.words import _

Bits = Literal[8, 16]
_OPS: Any = torch.ops


class Laid(nn.Module):
    """x·Wᵀ + b in bfloat16, W laid out once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.laid = _OPS.mkldnn._reorder_linear_weight(weight.detach().bfloat16().contiguous(), 1)
        self.bias = None if bias is None else nn.Parameter(bias.detach().bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        out: Tensor = _OPS.mkldnn._linear_pointwise(x, self.laid, self.bias, "none", [], "")
        return out


class Laid8(nn.Module):
    """The same with W in 8 bits, a scale an output, and x in 8 bits, a scale a row: no row knows of the others."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        full = weight.detach().float()
        scale = full.abs().amax(1).clamp(min=1e-12) / 127                                           # [O]
        # the library's fast kernel wants unsigned inputs: 128 is their zero
        self.laid = _OPS.onednn.qlinear_prepack((full / scale[:, None]).round().to(torch.int8), None)
        self.scale, self.zero = scale, torch.zeros(len(scale), dtype=torch.int32)
        self.bias = None if bias is None else nn.Parameter(bias.detach().bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        flat = x.flatten(0, -2).float()                                                             # [B, I]
        most = flat.abs().amax(-1, keepdim=True).clamp_(min=1e-12)      # a norm of infinity is ten times slower here
        small = torch.addcmul(_ZERO, flat, 127 / most).round_().to(torch.uint8)
        out: Tensor = _OPS.onednn.qlinear_pointwise(small, 1.0, 128, self.laid, self.scale, self.zero, None, 1.0, 0,
                                                    torch.bfloat16, "none", [], "")                 # [B, O]
        most = (most / 127).to(out.dtype)
        out = out * most if self.bias is None else torch.addcmul(self.bias, out, most)
        return out.unflatten(0, x.shape[:-1])


_ZERO = torch.tensor(128.0)


def able(bits: Bits) -> bool:
    """Return whether this processor and this PyTorch can compute so."""
    try:
        layer = (Laid8 if bits == 8 else Laid)(torch.eye(32), None)
        return bool(torch.isfinite(layer(torch.ones(1, 32, dtype=torch.bfloat16))).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack(model: DecoderModel, *, bits: Bits) -> DecoderModel:
    """Turn `model`, in place, into one in bfloat16 on the CPU that writes fast and can do nothing else; return it.

    16 bits are the same numbers as `model.bfloat16()` but for rounding; 8 bits are an approximation.  Layers of adapters stay
    as they are: merge first.  Raises ConfigError where it cannot be done here.
    """
    if next(model.parameters()).device.type != "cpu" or not able(bits):
        raise ConfigError(_("weights cannot be laid out in {n} bits on this machine").format(n=bits),
                          fix=_("leave the precision as it is"))
    kind = Laid8 if bits == 8 else Laid
    model.bfloat16().requires_grad_(False)
    model.speaks = kind(model.embed.weight if model.head is None else model.head.weight, None)
    if model.head is not None:
        model.head.weight = nn.Parameter(torch.empty(0), requires_grad=False)         # `speaks` has it
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not model.head:
                setattr(module, name, kind(child.weight, child.bias))
    return model.eval()

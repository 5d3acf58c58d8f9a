"""A frozen base in 4 or 8 bits, under adapters in full precision (QLoRA; Dettmers et al., 2023).  By bitsandbytes.

Only linear layers of the blocks are packed.  Each product unpacks its matrix, forward and backward, and keeps none.
I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danlu.errors import ConfigError
from danlu.nn.attention import working_dtype
from danlu.nn.collective import numbered
from danlu.words import _

Bits = Literal["nf4", "int8"]


def require() -> Any:
    """Return the functions of bitsandbytes.  Raises ConfigError that names the extra."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        raise ConfigError(_("a base in few bits needs bitsandbytes"), where="adapt.base",
                          fix=_('pip install "danlu[bnb]", or leave adapt.base out')) from None
    return bnb


class Packed(nn.Module):
    """A matrix [O, I] in few bits; what it stands for is `dense`.  A module, to go along with its layer, but without buffers:
    it belongs to the base and into no checkpoint of an adapter.
    """

    def __init__(self, kind: Bits, data: Tensor, state: Any, shape: torch.Size) -> None:
        super().__init__()
        self.kind, self.data, self.shape = kind, data, shape
        self.state = state              # bitsandbytes' own: scales of blocks, or of rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go where `fn` takes a layer's weights.  What its numbers are of stays: they are no weights of the model's type."""
        device = fn(torch.empty(0, device=self.data.device)).device
        if device != self.data.device:
            self.data = self.data.to(device)
            if isinstance(self.state, Tensor):
                self.state = self.state.to(device)
            else:
                self.state.to(device)                    # in place, unlike a tensor
        return super()._apply(fn, recurse)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [O, I]."""
        bnb = require()
        if self.kind == "nf4":
            return bnb.dequantize_4bit(self.data, self.state).view(self.shape).to(dtype)    # type: ignore[no-any-return]
        return bnb.int8_vectorwise_dequant(self.data, self.state).to(dtype)     # type: ignore[no-any-return]


def pack(weight: Tensor, kind: Bits) -> Packed:
    """Return `weight` [O, I] in few bits, on the device where it is."""
    bnb = require()
    if kind == "nf4":
        # as one row: of rows that 64 does not divide, bitsandbytes 0.50 on a CPU mistakes the scales when it unpacks them
        flat = weight.float().reshape(1, -1)
        data, state = bnb.quantize_4bit(flat, quant_type="nf4", compress_statistics=True)
        return Packed(kind, data, state, weight.shape)
    data, scales, _outliers = bnb.int8_vectorwise_quant(weight.half().contiguous())
    return Packed(kind, data, scales, weight.shape)


class _Product(torch.autograd.Function):
    """x·Wᵀ of a packed W, which never learns: the gradient of x unpacks it anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
        ctx.packed, ctx.dtype = packed, dtype
        with torch.autocast(x.device.type, enabled=False):
            return x.to(dtype) @ packed.dense(dtype).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ ctx.packed.dense(ctx.dtype), None, None


def product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Return x·Wᵀ + b [..., O] of x [..., I]."""
    out: Tensor = _Product.apply(x, packed, working_dtype(x))       # type: ignore[no-untyped-call]
    return out if bias is None else out + bias.to(out.dtype)


class PackedLinear(nn.Linear):
    """A linear layer whose `weight` is packed, and not there."""

    packed: Packed

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        return product(x, self.packed, self.bias)

    def unpack(self) -> None:
        """Become a plain linear layer again, with the weight that was computed with."""
        self.weight = nn.Parameter(self.packed.dense(), requires_grad=False)
        del self.packed
        self.__class__ = nn.Linear      # type: ignore[assignment]


def pack_all(model: Any, state: Mapping[str, Tensor], kind: Bits, device: str | torch.device) -> set[str]:
    """Pack the linear layers of `model`'s blocks from `state`, one after the other; return the names of their weights.

    Each is read, moved to `device` and packed before the next one: the whole base never lies there in full.
    """
    require()
    done = set()
    for number, block in numbered(model.blocks):
        for name, module in block.named_modules(prefix=f"blocks.{number}"):
            if isinstance(module, nn.Linear) and f"{name}.weight" in state and not module.weight.requires_grad:
                packed = pack(state[f"{name}.weight"].to(device), kind)
                module.register_parameter("weight", None)
                if type(module) is nn.Linear:
                    module.__class__ = PackedLinear
                module.packed = packed                   # type: ignore[assignment]
                done.add(f"{name}.weight")
    return done

"""Layers that an adapter turns a base's layers into, in place: `weight` and `bias` stay the tensors that they are.

B rows, T tokens, I inputs, O outputs, r rank, D width, P virtual tokens, G key heads, K head width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.adapt.quantize import Packed, product
from danlu.nn import placed
from danlu.nn.drop import dropout
from danlu.nn.mlp import Activation, activate

# Along which dimension a parameter is cut with its matrix under tensor parallelism; None: every process has it whole.
CUTS: dict[str, dict[str, int | None]] = {
    "lora_a": {"col": None, "row": 1}, "lora_a0": {"col": None, "row": 1},
    "lora_b": {"col": 0, "row": None}, "lora_b0": {"col": 0, "row": None},
    "magnitude": {"col": 0, "row": None}, "scale_out": {"col": 0, "row": None}, "scale_in": {"col": None, "row": 0},
}


def _fresh(like: Tensor, *shape: int, learns: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device), requires_grad=learns)


class LoRALinear(nn.Linear):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ + b (Hu et al., 2021); with a magnitude m, m·(W + sBA)/|W + sBA| in place of W + sBA (DoRA).

    Where there are `lora_a0` and `lora_b0` (PiSSA), BA - B₀A₀ stands for BA: the principal part of W is what moves, and W
    itself stays as it is.
    """

    rank: int
    scale: float
    dropout: float
    lora_a: nn.Parameter                # [r, I]
    lora_b: nn.Parameter                # [O, r]
    lora_a0: nn.Parameter | None        # [r, I], never trained
    lora_b0: nn.Parameter | None        # [O, r]
    magnitude: nn.Parameter | None      # [O]
    packed: Packed | None               # the weight in few bits; then there is no `weight`

    @staticmethod
    def of(linear: nn.Linear, *, rank: int, scale: float, dropout: float, dora: bool, pissa: bool) -> None:
        """Turn `linear` into one of these, in place, with parameters that have no content yet."""
        weight, (outs, ins) = linear.weight, linear.weight.shape
        linear.__class__ = LoRALinear
        assert isinstance(linear, LoRALinear)
        linear.rank, linear.scale, linear.dropout, linear.packed = rank, scale, dropout, None
        linear.lora_a, linear.lora_b = _fresh(weight, rank, ins), _fresh(weight, outs, rank)
        linear.register_parameter("lora_a0", _fresh(weight, rank, ins, learns=False) if pissa else None)
        linear.register_parameter("lora_b0", _fresh(weight, outs, rank, learns=False) if pissa else None)
        linear.register_parameter("magnitude", _fresh(weight, outs) if dora else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        seen = dropout(x, self.dropout, self.training)
        if self.magnitude is None and self.lora_b0 is None and not placed.is_part(x):
            out, low = self.base(x, self.bias), F.linear(seen, self.lora_a)
            flat = (out.flatten(0, -2), low.flatten(0, -2))
            return torch.addmm(*flat, self.lora_b.to(out.dtype).mT, alpha=self.scale).view(out.shape)
        added = F.linear(F.linear(seen, self.lora_a), self.lora_b)
        if self.lora_b0 is not None and self.lora_a0 is not None:
            added = added - F.linear(F.linear(seen, self.lora_a0), self.lora_b0)
        if self.magnitude is None:
            return self.base(x, self.bias) + self.scale * added
        out = (self.base(x, None) + self.scale * added) * (self.magnitude / self.norms()).to(added.dtype)
        return out if self.bias is None else out + self.bias

    def base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer says without its adapter, with `bias` or without."""
        return F.linear(x, self.weight, bias) if self.packed is None else product(x, self.packed, bias)

    def dense(self) -> Tensor:
        """Return the base's weight [O, I]."""
        return self.weight if self.packed is None else self.packed.dense()

    def moved(self) -> Tensor:
        """Return what is added to `weight`, [O, I]."""
        added = self.lora_b @ self.lora_a
        if self.lora_b0 is not None and self.lora_a0 is not None:
            added = added - self.lora_b0 @ self.lora_a0
        return self.scale * added

    def norms(self) -> Tensor:
        """Return |W + sBA| of each output [O]: a constant to the gradient, as in DoRA's section 4.3."""
        with torch.no_grad():
            # not linalg.norm: a sum of squares is a sum of the parts' where W is cut along its inputs
            return (self.dense() + self.moved()).square().sum(1).sqrt()

    @torch.no_grad()
    def merge(self) -> None:
        """Become a plain linear layer whose weight has it all, computed in float32 and rounded once."""
        whole = self.whole()
        if self.packed is None:
            self.weight.copy_(whole)
        else:
            self.weight = nn.Parameter(whole, requires_grad=False)
        del self.packed
        for name in ("lora_a", "lora_b", "lora_a0", "lora_b0", "magnitude"):
            delattr(self, name)
        self.__class__ = nn.Linear      # type: ignore[assignment]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Return the weight that does the same without an adapter, [O, I] in float32 at least."""
        full = torch.promote_types(self.lora_a.dtype, torch.float32)
        added = self.lora_b.to(full) @ self.lora_a.to(full)
        if self.lora_b0 is not None and self.lora_a0 is not None:
            added -= self.lora_b0.to(full) @ self.lora_a0.to(full)
        whole = self.dense().to(full) + self.scale * added
        return whole if self.magnitude is None else whole * (self.magnitude.to(full) / whole.norm(dim=1))[:, None]


class LoRAEmbedding(nn.Embedding):
    """The row of a token, plus s·B·A[:, token].  What reads `weight` as a head's table reads the base's."""

    rank: int
    scale: float
    lora_a: nn.Parameter                # [r, V]
    lora_b: nn.Parameter                # [D, r]

    @staticmethod
    def of(table: nn.Embedding, *, rank: int, scale: float) -> None:
        """Turn `table` into one of these, in place."""
        weight = table.weight
        table.__class__ = LoRAEmbedding
        assert isinstance(table, LoRAEmbedding)
        table.rank, table.scale = rank, scale
        table.lora_a, table.lora_b = _fresh(weight, rank, len(weight)), _fresh(weight, weight.shape[1], rank)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., D] from ids [...]."""
        out = F.embedding(ids, self.weight)
        if placed.is_part(out):         # each process has found the ids of its own rows: all must be together first
            from torch.distributed.tensor import Replicate

            out = out.redistribute(placements=[Replicate()])
        return out + self.scale * F.linear(F.embedding(ids, self.lora_a.mT), self.lora_b)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Return the table that does the same without an adapter, [V, D] in float32 at least."""
        full = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.to(full) + self.scale * (self.lora_b.to(full) @ self.lora_a.to(full)).mT

    @torch.no_grad()
    def merge(self) -> None:
        """Become a plain embedding that has it all, computed in float32 and rounded once."""
        self.weight.copy_(self.whole())
        self.strip()

    def strip(self) -> None:
        """Become the base's embedding again."""
        del self.lora_a, self.lora_b
        self.__class__ = nn.Embedding   # type: ignore[assignment]


class ScaledLinear(nn.Linear):
    """A linear layer whose outputs, or inputs, are each multiplied by a learned number (IA³; Liu et al., 2022)."""

    scale_out: nn.Parameter | None      # [O]
    scale_in: nn.Parameter | None       # [I]

    @staticmethod
    def of(linear: nn.Linear, *, inputs: bool) -> None:
        """Turn `linear` into one of these, in place."""
        weight, (outs, ins) = linear.weight, linear.weight.shape
        linear.__class__ = ScaledLinear
        linear.register_parameter("scale_out", None if inputs else _fresh(weight, outs))
        linear.register_parameter("scale_in", _fresh(weight, ins) if inputs else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        if self.scale_in is not None:
            return F.linear(x * self.scale_in.to(x.dtype), self.weight, self.bias)
        out = F.linear(x, self.weight, self.bias)
        assert self.scale_out is not None
        return out * self.scale_out.to(out.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Become a plain linear layer, computed in float32 and rounded once."""
        full = torch.promote_types(self.weight.dtype, torch.float32)
        if self.scale_in is not None:
            self.weight.copy_(self.weight.to(full) * self.scale_in.to(full))
        elif self.scale_out is not None:
            self.weight.copy_(self.weight.to(full) * self.scale_out.to(full)[:, None])
            if self.bias is not None:
                self.bias.copy_(self.bias.to(full) * self.scale_out.to(full))
        del self.scale_out, self.scale_in
        self.__class__ = nn.Linear      # type: ignore[assignment]


class Narrow(nn.Module):
    """x + up(activation(down(x))): a bottleneck after a part of a block (Houlsby et al., 2019)."""

    def __init__(self, width: int, inside: int, activation: Activation, like: Tensor) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.down = nn.Linear(width, inside, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(inside, width, dtype=like.dtype, device=like.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor shaped like x [..., D]."""
        return x + self.up(activate(self.down(x), self.activation))


class VirtualTokens(nn.Module):
    """What stands before the embedded tokens of every row (Lester et al., 2021)."""

    def __init__(self, tokens: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.weight = _fresh(like, tokens, width)

    def forward(self) -> Tensor:
        """Return [P, D]."""
        return self.weight


class Reparameterised(nn.Module):
    """Virtual tokens that a small network makes: easier to learn than the tokens themselves (Liu et al., 2021)."""

    def __init__(self, tokens: int, width: int, hidden: int, like: Tensor) -> None:
        super().__init__()
        self.weight = _fresh(like, tokens, width)
        self.first = nn.Linear(width, hidden, dtype=like.dtype, device=like.device)
        self.second = nn.Linear(hidden, hidden, dtype=like.dtype, device=like.device)
        self.third = nn.Linear(hidden, width, dtype=like.dtype, device=like.device)

    def forward(self) -> Tensor:
        """Return [P, D]."""
        out: Tensor = self.third(F.relu(self.second(F.relu(self.first(self.weight)))))
        return out


class KeysAndValues(nn.Module):
    """What every token of a layer can look at besides the others (prefix tuning; Li & Liang, 2021)."""

    def __init__(self, tokens: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.keys, self.values = _fresh(like, tokens, width), _fresh(like, tokens, width)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return k, v [B, S, G, K] with P more in front; of heads that are cut over processes, this one's."""
        made = []
        for ahead, x in ((self.keys, k), (self.values, v)):
            held = ahead.to_local() if placed.is_part(ahead) else ahead
            before = held.to(x.dtype).unflatten(-1, (-1, x.shape[-1]))      # [P, G, K]
            made.append(torch.cat((before.expand(len(x), *before.shape), x), 1))
        return made[0], made[1]

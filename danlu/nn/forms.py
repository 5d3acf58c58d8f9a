"""Forms of a matrix in fewer bits or numbers: its parts, what they stand for, and how many bytes they are.

O outputs, I inputs, G groups of a row, g weights of a group, r rank, M rows of all batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from danlu.config import Model

Parts = Mapping[str, Tensor]
Kernel = Callable[[Tensor], Tensor]

# The 16 levels of NF4: quantiles of a normal distribution, 0 among them (Dettmers et al., 2023, appendix E).
NORMAL = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
          -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


class Part(NamedTuple):
    """What of a matrix is stored under one name."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Int8(Model):
    """A number of 8 bits for each weight and one scale for each row, symmetric.  Products are of whole numbers where
    `activations` are rounded, too, each row of them by its own largest (Dettmers et al., 2022)."""

    kind: Literal["int8"] = "int8"
    activations: bool = Field(False, description="Round what the weights are multiplied with to 8 bits, as it comes.")
    divided: bool = Field(False, description="Inputs are divided by factors that the weights were multiplied with.")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Return what is stored of a matrix [rows, columns]."""
        return {"codes": Part((rows, columns), torch.int8), "scales": Part((rows,), torch.float32),
                **_factors(self.divided, columns)}

    def grid(self, weight: Tensor) -> Tensor:
        """Return the scales [O] of the rows of `weight` [O, I]; a row of zeros has the scale 1."""
        scales = weight.float().abs().amax(1) / 127
        return torch.where(scales > 0, scales, 1.0)

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the codes of `weight` [O, I], each the nearest there is."""
        return (weight.float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of `weight` [O, I], rounded to nearest."""
        scales = self.grid(weight)
        return {"codes": self.nearest(weight, scales), "scales": scales}

    def value(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return what codes [O, I], one to a byte, stand for."""
        return codes.float() * scales[:, None]

    def dense(self, parts: Parts, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [O, I] that the parts stand for."""
        return self.value(parts["codes"], parts["scales"]).to(dtype)

    def stored(self, codes: Tensor) -> Tensor:
        """Return codes [O, I] as they are stored."""
        return codes

    def kernel(self, parts: Parts, columns: int) -> Kernel | None:
        """Return what computes x·Wᵀ [M, O] of x [M, I] on packed weights, or None where there is nothing."""
        codes, scales = parts["codes"], parts["scales"]
        if self.activations:
            if codes.device.type != "cpu" and (len(codes) % 8 or columns % 8):      # torch._int_mm refuses them
                return None

            def whole_numbers(x: Tensor) -> Tensor:
                peaks = x.abs().amax(1, keepdim=True).float().clamp_(min=1e-30) / 127
                small = (x / peaks).round_().to(torch.int8)
                return torch._int_mm(small, codes.mT).float().mul_(peaks).mul_(scales)
            return whole_numbers
        if codes.device.type != "cpu" or columns % 16:
            return None
        rounded = scales.bfloat16()
        return lambda x: torch._weight_int8pack_mm(x.bfloat16(), codes, rounded)


class Int4(Model):
    """A number of 4 bits for each weight; each `group` of a row has a scale and an offset, in bfloat16."""

    kind: Literal["int4"] = "int4"
    group: int = Field(64, gt=0, description="Weights of a row that share a scale.")
    divided: bool = Field(False, description="Inputs are divided by factors that the weights were multiplied with.")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Return what is stored of a matrix [rows, columns]; of a code two weights, the first in the low bits."""
        return {"codes": Part((rows, -(-columns // 2)), torch.uint8),
                "scales": Part((-(-columns // self.group), rows, 2), torch.bfloat16), **_factors(self.divided, columns)}

    def grid(self, weight: Tensor) -> Tensor:
        """Return scale and offset [G, O, 2] of each group of `weight` [O, I], so that code 8 stands for the offset."""
        groups = _grouped(weight.float(), self.group)                       # [O, G, g]
        low, high = groups.nan_to_num(math.inf).amin(-1), groups.nan_to_num(-math.inf).amax(-1)
        scale = ((high - low) / 15).to(torch.bfloat16).float()
        scale = torch.where(scale > 0, scale, 1.0)
        offset = torch.where(high > low, low + 8 * scale, low)
        return torch.stack((scale, offset), -1).to(torch.bfloat16).transpose(0, 1).contiguous()

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the codes [O, I] of `weight`, each the nearest there is, one to a byte."""
        scale, offset = self._spread(scales, weight.shape[1])
        return ((weight.float() - offset) / scale).round().add(8).clamp(0, 15).to(torch.uint8)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of `weight` [O, I], rounded to nearest."""
        scales = self.grid(weight)
        return {"codes": paired(self.nearest(weight, scales)), "scales": scales}

    def dense(self, parts: Parts, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [O, I] that the parts stand for."""
        return self.value(split(parts["codes"])[:, :columns], parts["scales"]).to(dtype)

    def value(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return what codes [O, I], one to a byte, stand for."""
        scale, offset = self._spread(scales, codes.shape[1])
        return (codes.float() - 8) * scale + offset

    def stored(self, codes: Tensor) -> Tensor:
        """Return codes [O, I] as they are stored."""
        return paired(codes)

    def kernel(self, parts: Parts, columns: int) -> Kernel | None:
        """Return what computes x·Wᵀ [M, O] of x [M, I] on packed weights, laid out for it; None where there is nothing."""
        codes = parts["codes"]
        if codes.device.type != "cpu" or self.group not in (32, 64, 128, 256) or columns % self.group or len(codes) % 64:
            return None
        laid, scales = torch._convert_weight_to_int4pack_for_cpu(split(codes).int(), 1), parts["scales"]
        return lambda x: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), laid, self.group, scales)

    def _spread(self, scales: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        both = scales.float().repeat_interleave(self.group, 0)[:columns]    # [I, O, 2]
        return both[..., 0].mT, both[..., 1].mT


class NF4(Model):
    """One of 16 levels for each weight, those of a normal distribution, times its group's largest (Dettmers et al., 2023)."""

    kind: Literal["nf4"] = "nf4"
    group: int = Field(64, gt=0, description="Weights of a row that share a scale.")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Return what is stored of a matrix [rows, columns]; of a code two weights, the first in the low bits."""
        return {"codes": Part((rows, -(-columns // 2)), torch.uint8),
                "scales": Part((rows, -(-columns // self.group)), torch.float16)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of `weight` [O, I], each weight the nearest level."""
        groups = _grouped(weight.float(), self.group)                       # [O, G, g]
        scales = groups.nan_to_num(0).abs().amax(-1).to(torch.float16)
        whole = scales.float().repeat_interleave(self.group, 1)[:, : weight.shape[1]]
        levels = torch.tensor(NORMAL, device=weight.device)
        borders = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(torch.where(whole > 0, weight.float() / whole, 0.0), borders)
        return {"codes": paired(codes.to(torch.uint8)), "scales": scales}

    def dense(self, parts: Parts, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [O, I] that the parts stand for."""
        codes = split(parts["codes"])[:, :columns]
        scales = parts["scales"].float().repeat_interleave(self.group, 1)[:, :columns]
        return (torch.tensor(NORMAL, device=codes.device)[codes.long()] * scales).to(dtype)

    def kernel(self, parts: Parts, columns: int) -> Kernel | None:
        """Return None: there is no kernel for it, whole matrices are made."""
        return None


class Bits(Model):
    """A matrix of many zeros: a bit for each weight, whether it is one, and the others in their order (`count` of them)."""

    kind: Literal["bits"] = "bits"
    count: int = Field(ge=0, description="Weights that are not zero.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the weights.")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Return what is stored of a matrix [rows, columns]."""
        return {"mask": Part((rows, -(-columns // 8)), torch.uint8), "values": Part((self.count,), getattr(torch, self.dtype))}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of `weight` [O, I]."""
        there = F.pad((weight != 0).to(torch.uint8), (0, -weight.shape[1] % 8)).unflatten(1, (-1, 8))
        bits = there << torch.arange(8, dtype=torch.uint8, device=weight.device)
        return {"mask": bits.sum(-1).to(torch.uint8), "values": weight[weight != 0].to(getattr(torch, self.dtype))}

    def dense(self, parts: Parts, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [O, I] that the parts stand for."""
        mask = parts["mask"]
        there = (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1).flatten(1)[:, :columns].bool()
        whole = torch.zeros(there.shape, dtype=dtype, device=mask.device)
        whole[there] = parts["values"].to(dtype)
        return whole


class Low(Model):
    """A matrix as the product of two thin ones, `up` [O, r] · `down` [r, I], which learn as any weight does unless they are in
    fewer bits, too."""

    kind: Literal["low"] = "low"
    rank: int = Field(gt=0, description="Columns of the one, rows of the other.")
    rounded: Annotated[Int8 | Int4 | NF4, Field(discriminator="kind")] | None = Field(None, description="Form of both.")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Return what is stored of a matrix [rows, columns]."""
        if self.rounded is None:
            return {"down": Part((self.rank, columns), torch.float32), "up": Part((rows, self.rank), torch.float32)}
        down, up = self.rounded.parts(self.rank, columns), self.rounded.parts(rows, self.rank)
        return {f"{name}_{part}": told for name, each in (("down", down), ("up", up)) for part, told in each.items()}

    def round(self, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        """Return the parts of two thin matrices, both rounded to nearest."""
        assert self.rounded is not None, "thin matrices that are whole are their own parts"
        return {f"{name}_{part}": held for name, thin in (("down", down), ("up", up))
                for part, held in self.rounded.pack(thin).items()}

    def thin(self, parts: Parts, columns: int) -> tuple[Tensor, Tensor]:
        """Return the two matrices [O, r] and [r, I] that the parts stand for."""
        if self.rounded is None:
            return parts["up"], parts["down"]
        up, down = ({name.partition("_")[2]: part for name, part in parts.items() if name.startswith(f"{which}_")}
                    for which in ("up", "down"))
        return self.rounded.dense(up, self.rank), self.rounded.dense(down, columns)

    def dense(self, parts: Parts, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [O, I] that the parts stand for."""
        up, down = self.thin(parts, columns)
        return (up @ down).to(dtype)


class Cut(Model):
    """A matrix of fewer rows or columns than the model's config says: heads of attention were taken out."""

    kind: Literal["cut"] = "cut"
    rows: int = Field(gt=0, description="Rows that are left.")
    columns: int = Field(gt=0, description="Columns that are left.")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Return what is stored of a matrix [rows, columns]."""
        return {"weight": Part((self.rows, self.columns), torch.float32)}


Form = Annotated[Int8 | Int4 | NF4 | Bits | Low | Cut, Field(discriminator="kind")]
Rounded = Int8 | Int4 | NF4                              # forms of fewer bits
Table = Sequence[tuple[str, Int8 | Int4 | NF4 | Bits | Low | Cut]]


def _factors(divided: bool, columns: int) -> dict[str, Part]:
    return {"factors": Part((columns,), torch.float16)} if divided else {}


def _grouped(weight: Tensor, group: int) -> Tensor:
    """Return weight [O, I] as [O, G, g]; what the last group lacks is NaN."""
    groups: Tensor = F.pad(weight, (0, -weight.shape[1] % group), value=math.nan).unflatten(1, (-1, group))
    return groups


def paired(codes: Tensor) -> Tensor:
    """Return codes [O, I] below 16 two to a byte, [O, ⌈I/2⌉]: the first in the low bits."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def split(codes: Tensor) -> Tensor:
    """Return codes [O, I] one to a byte, I even: the inverse of `paired`."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)



class Told(Model):
    """A form as JSON tells it."""

    form: Form

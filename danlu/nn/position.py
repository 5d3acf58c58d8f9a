"""Positions: rotary angles (Su et al., 2021), plain and stretched to longer contexts.

B rows, T tokens, H heads, K head width.  Learned positions are an nn.Embedding and need nothing from here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from danlu.config import Model
from danlu.words import _


class Linear(Model):
    """Every angle divided by `factor` (Chen et al., 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1, allow_inf_nan=False, description="How many times longer the context becomes.")

    def frequencies(self, plain: Tensor, theta: float) -> tuple[Tensor, float]:
        """Return the stretched frequencies [K/2] and the factor of cos and sin."""
        return plain / self.factor, 1.0


class Llama3(Model):
    """Long waves divided by `factor`, short ones left, a ramp between (Llama 3.1, Dubey et al., 2024)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1, allow_inf_nan=False, description="How many times longer the context becomes.")
    low: float = Field(default=1.0, gt=0, allow_inf_nan=False,
                       description="Waves that fit the original context fewer times than this are divided.")
    high: float = Field(default=4.0, gt=0, allow_inf_nan=False,
                        description="Waves that fit the original context more often than this stay.")
    original: int = Field(gt=0, description="The context that the model was first trained with.")

    @model_validator(mode="after")
    def _ordered(self) -> Llama3:
        if self.low >= self.high:
            raise ValueError(_("scaling.low must be less than scaling.high"))
        return self

    def frequencies(self, plain: Tensor, theta: float) -> tuple[Tensor, float]:
        """Return the stretched frequencies [K/2] and the factor of cos and sin."""
        wave = 2 * math.pi / plain
        share = (self.original / wave - self.low) / (self.high - self.low)          # 0 = divide, 1 = leave
        ramp = (1 - share) * plain / self.factor + share * plain
        stretched = torch.where(wave > self.original / self.low, plain / self.factor, ramp)
        return torch.where(wave < self.original / self.high, plain, stretched), 1.0


class Yarn(Model):
    """Fast dimensions left, slow ones divided, and the scores sharpened a little (Peng et al., 2023)."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1, allow_inf_nan=False, description="How many times longer the context becomes.")
    original: int = Field(gt=0, description="The context that the model was first trained with.")
    fast: float = Field(default=32.0, gt=0, allow_inf_nan=False,
                        description="Dimensions that turn more often than this over the original context stay.")
    slow: float = Field(default=1.0, gt=0, allow_inf_nan=False,
                        description="Dimensions that turn less often than this are divided.")
    attention: float | None = Field(default=None, gt=0, allow_inf_nan=False,
                                    description="Factor of cos and sin; empty: 0.1 ln(factor) + 1.")
    truncate: bool = Field(default=True, description="Round the ramp's ends to whole dimensions.")

    def frequencies(self, plain: Tensor, theta: float) -> tuple[Tensor, float]:
        """Return the stretched frequencies [K/2] and the factor of cos and sin."""
        width = 2 * plain.numel()
        first, last = (width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                       for turns in (self.fast, self.slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        if first == last:
            last += 0.001
        number = torch.arange(width // 2, dtype=torch.float32, device=plain.device)
        left = 1 - ((number - first) / (last - first)).clamp(0, 1)
        sharpen = self.attention or (0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0)
        return plain / self.factor * (1 - left) + plain * left, sharpen


Scaling = Linear | Llama3 | Yarn


def frequencies(head_width: int, theta: float, scaling: Scaling | None = None) -> tuple[Tensor, float]:
    """Return each pair's angle per position [K/2] (float32, on the CPU) and the factor of cos and sin."""
    plain = 1.0 / (theta ** (torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width))
    return (plain, 1.0) if scaling is None else scaling.frequencies(plain, theta)


def turn(positions: Tensor, angles: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [B or 1, T, K/2] in `dtype`, for positions [B or 1, T]; computed in float32."""
    angle = positions[..., None].float() * angles.to(positions.device)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, H, K] with dimensions i and i + K/2 turned together, as Hugging Face lays them out."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]                 # [B or 1, T, 1, K/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

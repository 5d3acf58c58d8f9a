"""Bottleneck adapters: small networks between the parts of a block (Houlsby et al., 2019; Pfeiffer et al., 2021)."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from danlu.adapt.layers import Narrow
from danlu.adapt.lora import Kept, _uniform
from danlu.adapt.targets import freeze
from danlu.config import Model
from danlu.layout import Layout
from danlu.nn import placed
from danlu.nn.collective import numbered
from danlu.nn.mlp import Activation


class Bottleneck(Model):
    """x + up(activation(down(x))) after attention and after the feed-forward part, or after the latter alone."""

    merges: ClassVar[bool] = False

    kind: Literal["bottleneck"] = "bottleneck"
    style: Literal["houlsby", "pfeiffer"] = Field("pfeiffer", description="houlsby: two in a block; pfeiffer: one.")
    reduction: int = Field(16, gt=0, description="Width of the model over the width inside.")
    activation: Activation = Field("gelu", description="Between down and up.")
    modules_to_save: Kept = ()

    def apply(self, model: Any) -> None:
        """Freeze `model` (whole) and put the networks in."""
        freeze(model, self.modules_to_save)
        width = model.cfg.width
        for _number, block in numbered(model.blocks):
            for part in (block.attention, block.mlp) if self.style == "houlsby" else (block.mlp,):
                part.after = Narrow(width, max(1, width // self.reduction), self.activation, model.embed.weight)

    def begin(self, model: Any, seed: int) -> None:
        """Fill in what `apply` added; what goes up is 0 at first, so that nothing changes."""
        for name, module in model.named_modules():
            if isinstance(module, Narrow):
                placed.fill(module.down.weight, _uniform(module.down.weight, f"{name}.down.weight", seed))
                for zero in (module.down.bias, module.up.weight, module.up.bias):
                    placed.fill(zero, partial(torch.zeros, zero.shape))

    def merge(self, model: Any) -> None:
        raise AssertionError("a network between two layers is no part of either: asked for `merges` first")

    def rate(self, name: str) -> float:
        return 1.0

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        return []

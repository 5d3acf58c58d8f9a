"""Training for few bits: the model computes with rounded weights, and the weights learn to be rounded (QAT)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from danlu.adapt.targets import linears, matches
from danlu.config import Model
from danlu.layout import Layout
from danlu.nn import rounded
from danlu.nn.forms import Int4, Int8


class QAT(Model):
    """All weights learn while the model computes with them in few bits, as `danlu quantize` will round them: to nearest, in 8
    bits for each row's largest, or in 4 for each group (Jacob et al., 2017)."""

    merges: ClassVar[bool] = True

    kind: Literal["qat"] = "qat"
    bits: Literal[8, 4] = Field(4, description="Of a weight.")
    group: int = Field(64, gt=0, description="Weights of a row that share a scale, in 4 bits.")
    embeddings: Literal["int8", "keep"] = Field("int8", description="The table of tokens, and the head of the vocabulary.")
    keep: tuple[str, ...] = Field((), description="Layers that stay as they are, by name or pattern.")
    also: tuple[str, ...] = Field((), description="Layers beside, such as heads of tasks, which else stay as they are.")

    @property
    def form(self) -> Int8 | Int4:
        """The form of linear layers."""
        return Int8() if self.bits == 8 else Int4(group=self.group)

    def apply(self, model: Any) -> None:
        """Let the layers of `model` (whole) compute with rounded weights.  ConfigError for a name that means none."""
        for layer in linears(model, keep=self.keep, also=self.also, where="adapt.").values():
            rounded.become(layer, self.form)
        if self.embeddings == "int8" and model.cfg.kind != "foreign":
            for name in ("embed", "head"):
                table = getattr(model, name, None)
                if type(table) in (nn.Embedding, nn.Linear) and not any(matches(pattern, name) for pattern in self.keep):
                    rounded.become(table, Int8())

    def begin(self, model: Any, seed: int) -> None:
        """Nothing was added."""

    def merge(self, model: Any) -> None:
        """Let the weights be what the model computed with."""
        for layer in model.modules():
            if rounded.is_rounded(layer):
                rounded.settle(layer)

    def rate(self, name: str) -> float:
        return 1.0

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        return []

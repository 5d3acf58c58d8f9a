"""Adapters that leave every layer as it is: virtual tokens before each row, or keys and values before each layer's.

P virtual tokens, D width, G key heads, K head width.  Unlike the others they change what the model says from the first
step on: there is more to look at.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from danlu import chance
from danlu.adapt.layers import KeysAndValues, Reparameterised, VirtualTokens
from danlu.adapt.lora import Kept, Start, _normal, _uniform
from danlu.adapt.targets import freeze
from danlu.config import Model
from danlu.layout import Layout
from danlu.nn import placed
from danlu.nn.collective import numbered
from danlu.words import _


def _of_rows(tokens: int, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
    """Return what cannot be where rows grow by `tokens`."""
    problems = []
    if pack:
        problems.append(_("virtual tokens belong to one text, and a packed row holds several; set pack=false"))
    if layout.cp > 1 or layout.sequence:
        problems.append(_("virtual tokens make rows longer than layout.cp and layout.sequence can cut; leave those out, "
                          "or use adapt=prefix"))
    if layout.pp > 1:
        problems.append(_("virtual tokens are in the first stage, and the others would have nothing to learn; set layout.pp=1, "
                          "or use adapt=prefix"))
    return problems + _of_context(tokens, length, context)


def _of_context(tokens: int, length: int, context: int | None) -> list[str]:
    if context is None or length + tokens <= context:
        return []
    return [_("length={length} and adapt.tokens={tokens} are more than the model's context of {context}; lower one of "
              "them").format(length=length, tokens=tokens, context=context)]


class Virtual(Model):
    """What every kind of virtual tokens has."""

    merges: ClassVar[bool] = False

    tokens: int = Field(20, gt=0, description="Virtual tokens.")
    modules_to_save: Kept = ()

    def merge(self, model: Any) -> None:
        raise AssertionError("virtual tokens are no part of a weight: asked for `merges` first")

    def rate(self, name: str) -> float:
        return 1.0

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        return _of_rows(self.tokens, layout, length=length, context=context, pack=pack)


class Prompt(Virtual):
    """Virtual tokens, learned as vectors, before the embedded tokens of each row (prompt tuning; Lester et al., 2021)."""

    kind: Literal["prompt"] = "prompt"
    start: Start = None

    def apply(self, model: Any) -> None:
        """Freeze `model` (whole) and put the tokens before what it reads."""
        freeze(model, self.modules_to_save)
        model.ahead.prompt = VirtualTokens(self.tokens, model.cfg.width, model.embed.weight)
        model.ahead.tokens = self.tokens

    def begin(self, model: Any, seed: int) -> None:
        """Fill in the tokens: those of words drawn from the vocabulary."""
        if model.ahead.prompt is not None:
            weight = model.ahead.prompt.weight
            placed.fill(weight, partial(drawn, placed.whole(model.embed.weight), len(weight), seed))


def drawn(table: Tensor, tokens: int, seed: int) -> Tensor:
    """Return rows of `table` [V, D] drawn at random, [tokens, D]."""
    source = torch.Generator().manual_seed(chance.torch_seed(seed, "init/ahead.prompt.weight"))
    return table.detach()[torch.randint(len(table), (tokens,), generator=source).to(table.device)]


class PTuning(Virtual):
    """Virtual tokens that a small network makes (P-tuning; Liu et al., 2021).  Only what it makes is needed afterwards."""

    kind: Literal["ptuning"] = "ptuning"
    hidden: int = Field(128, gt=0, description="Width inside the network.")

    def apply(self, model: Any) -> None:
        """Freeze `model` (whole) and put the tokens before what it reads."""
        freeze(model, self.modules_to_save)
        model.ahead.prompt = Reparameterised(self.tokens, model.cfg.width, self.hidden, model.embed.weight)
        model.ahead.tokens = self.tokens

    def begin(self, model: Any, seed: int) -> None:
        """Fill in the network."""
        for name, p in model.ahead.named_parameters():
            if p.ndim < 2:
                placed.fill(p, partial(torch.zeros, p.shape))
            else:
                placed.fill(p, (_normal if name == "prompt.weight" else _uniform)(p, f"ahead.{name}", seed))


class Prefix(Virtual):
    """Keys and values, learned as vectors, before those of every layer (prefix tuning; Li & Liang, 2021)."""

    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(20, gt=0, description="Virtual tokens of each layer.")
    start: Start = None

    def apply(self, model: Any) -> None:
        """Freeze `model` (whole) and put the keys and values before each layer's."""
        freeze(model, self.modules_to_save)
        model.ahead.keys = self.tokens
        for _number, block in numbered(model.blocks):
            block.attention.prefix = KeysAndValues(self.tokens, block.attention.k.out_features, block.attention.k.weight)

    def begin(self, model: Any, seed: int) -> None:
        """Fill in small random keys and values."""
        for name, module in model.named_modules():
            if isinstance(module, KeysAndValues):
                for kind, p in module.named_parameters():
                    placed.fill(p, partial(_scaled, p, f"{name}.{kind}", seed, model.cfg.init_std))

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        return _of_context(self.tokens, length, context)


def _scaled(like: Tensor, name: str, seed: int, std: float) -> Tensor:
    return _normal(like, name, seed)() * std

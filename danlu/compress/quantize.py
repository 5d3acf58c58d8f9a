"""Weights in fewer bits: which layers of a model, by which method, in which form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from danlu.adapt.targets import linears, matches
from danlu.compress import awq, rows
from danlu.compress.gptq import gptq
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.nn import forms, packed
from danlu.words import _

Method = Literal["rtn", "gptq", "awq", "dynamic", "nf4"]


class Quantize(Model):
    """How the weights of a model are rounded.

    rtn: each to the nearest there is; gptq, awq: so that calibration rows are told least differently (Frantar et al., 2022;
    Lin et al., 2023); dynamic: activations are rounded as well, as they come; nf4: levels of a normal distribution.
    """

    bits: Literal[8, 4] = Field(8, description="Of a weight.")
    method: Method = Field("rtn", description="How it is rounded.")
    group: int = Field(64, gt=0, description="Weights of a row that share a scale, in 4 bits.")
    embeddings: Literal["int8", "keep"] = Field("int8", description="The table of tokens, and the head of the vocabulary.")
    keep: tuple[str, ...] = Field((), description="Layers that stay as they are.")
    also: tuple[str, ...] = Field((), description="Layers beside, such as heads of tasks, which else stay as they are.")

    @model_validator(mode="after")
    def _fits(self) -> Quantize:
        if (self.method == "dynamic" and self.bits != 8) or (self.method == "nf4" and self.bits != 4):
            raise ValueError(_("method={method} has no {bits} bits").format(method=self.method, bits=self.bits))
        return self

    @property
    def form(self) -> forms.Rounded:
        """The form of linear layers."""
        if self.method == "nf4":
            return forms.NF4(group=self.group)
        if self.bits == 4:
            return forms.Int4(group=self.group)
        return forms.Int8(activations=self.method == "dynamic")


@torch.no_grad()
def quantize(model: Any, how: Quantize, given: rows.Rows | None = None) -> forms.Table:
    """Round the weights of `model`, in place; return the forms of its layers.

    given: calibration rows, which gptq and awq need.  Embeddings and the vocabulary's head are rounded to nearest.
    """
    assert not model.training, "dropout would blur what the layers are given: call model.eval() first"
    if any(packed.is_packed(layer) and not _thin(layer) for layer in model.modules()):
        raise ConfigError(_("the weights are packed already"), fix=_("start from the model that they were packed from"))
    layers = linears(model, keep=how.keep, also=how.also, kinds=(nn.Linear, packed.LowLinear))
    for name in [name for name, layer in layers.items() if _thin(layer)]:
        _round_thin(layers.pop(name), how)
    if how.method in ("gptq", "awq"):
        for stage in rows.stages(model, layers, rows.needed(given, how.method)):
            _with_rows(model, how, stage)
    else:
        for layer in layers.values():
            packed.become(layer, how.form, how.form.pack(layer.weight))
    if how.embeddings == "int8" and model.cfg.kind != "foreign":
        for name in ("embed", "head"):
            table: Any = getattr(model, name, None)
            if type(table) in (nn.Embedding, nn.Linear) and not any(matches(pattern, name) for pattern in how.keep):
                packed.become(table, forms.Int8(), forms.Int8().pack(table.weight))
    return packed.forms(model)


def _thin(layer: object) -> bool:
    """Return whether a layer has two thin matrices that are not rounded."""
    return isinstance(layer, packed.LowLinear) and layer.form.rounded is None


def _round_thin(layer: Any, how: Quantize) -> None:
    """Round both matrices of a layer.  ConfigError: the method is one for whole matrices."""
    if how.method not in ("rtn", "nf4"):
        raise ConfigError(_("{method} is for whole matrices, and these are products of thin ones").format(method=how.method),
                          where="--method", fix="--method rtn")
    form = layer.form.model_copy(update={"rounded": how.form})
    packed.become(layer, form, form.round(*packed.thin(layer)))


def _with_rows(model: Any, how: Quantize, stage: rows.Stage) -> None:
    """Round the layers of a stage, knowing what they are given."""
    found = rows.moments(stage.layers, stage.run)
    form: Any = how.form
    if how.method == "gptq":
        for name, layer in stage.layers.items():
            packed.become(layer, form, gptq(layer.weight.float(), found[name], form))
        return
    first = next(iter(stage.layers))
    block = model.get_submodule(".".join(first.split(".")[:2])) if first.startswith("blocks.") and len(model.blocks) else None
    _divided(stage.layers, form, awq.scale(model, block, stage.layers, found, form))


def _divided(layers: Mapping[str, nn.Linear], form: Any, by: Mapping[str, Tensor]) -> None:
    """Round layers to nearest; those that divide their inputs themselves keep the factors."""
    for name, layer in layers.items():
        own = form.model_copy(update={"divided": name in by})
        packed.become(layer, own, own.pack(layer.weight) | ({"factors": by[name]} if name in by else {}))

"""Public models by name, as shapes of our own families: models.yaml, with sources.  Nothing is downloaded, nothing allocated."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from danlu import config, yamls
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.rehearse.trace import trace
from danlu.train.recipe import Run
from danlu.words import _

TABLE = Path(__file__).with_name("models.yaml")


class Claim(Model):
    """What is often told of training a model, and cannot be."""

    machine: str                                         # as `hardware.parse` reads it
    tokens: float
    days: float
    truth: str                                           # where the figure comes from


class Public(Model):
    """A model that has been published."""

    name: str
    aliases: tuple[str, ...] = ()
    config: Annotated[Decoder | Encoder, Field(discriminator="kind")]
    parameters: int                                      # as published
    source: str
    note: str = ""                                       # where our shape is an approximation
    told: tuple[Claim, ...] = ()


class _Table(Model):
    models: tuple[Public, ...]


@cache
def _table() -> _Table:
    data, lines = yamls.read(TABLE)
    return config.validate(_Table, data, {key: f"{TABLE}:{line}" for key, line in lines.items()})


def models() -> tuple[Public, ...]:
    """Return all of them."""
    return _table().models


def public(name: str) -> Public:
    """Return the model of that name.  Raises ConfigError with what was meant."""
    known = {_plain(alias): one for one in models() for alias in (one.name, *one.aliases)}
    if _plain(name) in known:
        return known[_plain(name)]
    close = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.5)
    raise ConfigError(
        _("unknown model {name!r}").format(name=name) + (_(" — did you mean {name!r}?").format(name=known[close[0]].name)
                                                          if close else ""),
        where="--model", fix=_("known: {names}; or plan a recipe of your own: danlu plan recipe.yaml").format(
            names=", ".join(one.name for one in models())))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


@cache
def parameters(shape: Decoder | Encoder) -> int:
    """Return the number of parameters of the model that `shape` builds."""
    return sum(parameter.numel() for parameter in build(shape).parameters())


def pretraining(shape: Decoder | Encoder, *, length: int | None = None, rows: int = 1, **changes: object) -> Run:
    """Return a run that trains `shape` from random weights on a GPU, with AdamW in bf16; changes: of its keys."""
    shape = shape if isinstance(shape, Decoder) else shape.model_copy(update={"outputs": ("mlm",), "pooler": False})
    objective = {"kind": "causal_lm" if isinstance(shape, Decoder) else "masked_lm"}
    return config.validate(Run, {
        "out": "planned", "data": [{"path": "planned"}], "model": shape.model_dump(), "objective": objective,
        "optim": {"kind": "adamw"}, "schedule": {"kind": "constant"}, "steps": 1, "rows": rows,
        "length": length or shape.context, "precision": "bf16", "device": "cuda", **changes})


@cache
def flops(shape: Decoder | Encoder, length: int) -> float:
    """Return the FLOPs of training on one token in rows of `length`, as the operations of one and of two blocks count them."""
    counts = []
    for layers in (1, 2):
        run = pretraining(shape.model_copy(update={"layers": layers, "full_layers": 0} if isinstance(shape, Decoder)
                                           else {"layers": layers}), length=length)
        counts.append(sum(trace(run, 0).stages[0].usual.flops))
    block = counts[1] - counts[0]
    return (counts[0] + (shape.layers - 1) * block) / length

"""Optimizers.  A configuration is the object: `AdamW(lr=3e-4).build(model.named_parameters())` is a torch optimizer.

`classic` holds those that torch has, `lamb`, `lion` and `muon` ours, `groups` what all of them share.  State is made of
tensors and plain numbers only, and `param_groups` carry `names`, so a checkpoint needs no pickle.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from danlu.optim.classic import GD, SGD, Adafactor, Adagrad, Adam, AdamW, Momentum, Nesterov, RMSprop
from danlu.optim.groups import set_rate
from danlu.optim.lamb import LAMB
from danlu.optim.lion import Lion
from danlu.optim.muon import Muon

Optim = GD | SGD | Momentum | Nesterov | Adagrad | RMSprop | Adam | AdamW | Adafactor | LAMB | Lion | Muon
Optimizers = Annotated[Optim, Field(discriminator="kind")]

__all__ = [
    "GD",
    "LAMB",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Momentum",
    "Muon",
    "Nesterov",
    "Optim",
    "Optimizers",
    "RMSprop",
    "set_rate",
]

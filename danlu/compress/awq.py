"""AWQ: weights of large inputs are made larger before they are rounded, and what makes the input smaller (Lin et al., 2023).

Where the layer before can take the factors in, it does; elsewhere the layer divides its inputs itself.
O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from danlu.compress.rows import Moments, error
from danlu.nn.forms import Int4, Int8

POWERS = 20                                              # of the mean input that are tried: 0, 1/20 … 1


def factors(weights: list[Tensor], moment: Moments, form: Int8 | Int4) -> Tensor:
    """Return [I] by which the columns of `weights`, which have the same inputs, are best multiplied before they are rounded.

    All 1 is among what is tried, so nothing gets worse than rounded to nearest.
    """
    mean = moment.mean.clamp(min=1e-4 * float(moment.mean.max()) + 1e-20)
    best, least = torch.ones_like(mean), float("inf")
    for power in range(POWERS + 1):
        tried = mean ** (power / POWERS)
        tried = (tried / (tried.max() * tried.min()).sqrt()).half().float()     # as it is stored
        if not (torch.isfinite(tried).all() and (tried > 0).all()):
            continue
        found = sum(error(_rounded(weight, tried, form) - weight, moment) for weight in weights)
        if found < least:
            best, least = tried, found
    return best


def _rounded(weight: Tensor, by: Tensor, form: Int8 | Int4) -> Tensor:
    return form.dense(form.pack(weight * by), weight.shape[1]) / by


def scale(model: Any, block: Any, layers: Mapping[str, nn.Linear], found: Mapping[str, Moments], form: Int8 | Int4,
          ) -> dict[str, Tensor]:
    """Multiply the columns of `layers` (one block's) by the best factors; what comes before is divided by them.

    Returns the factors of the layers, by name, that have nothing before them that could be divided.
    """
    left: dict[str, Tensor] = {}
    names = {id(layer): name for name, layer in layers.items()}
    for members in groups(block, list(layers.values())):
        moment = found[names[id(members[0])]]
        best = factors([layer.weight.detach().float() for layer in members], moment, form)
        if bool((best == 1).all()):
            continue
        before = neighbour(model, block, members) if block is not None else None
        for layer in members:
            layer.weight.data.mul_(best)
            if before is None:
                left[names[id(layer)]] = best
        for tensor in before or ():
            tensor.data.div_(best.view(-1, *[1] * (tensor.ndim - 1)))
    return left


def groups(block: Any, layers: list[nn.Linear]) -> list[list[nn.Linear]]:
    """Return the layers in groups that are given the same inputs."""
    rest = {id(layer): layer for layer in layers}
    made = []
    if block is not None:
        attention, mlp = block.attention, block.mlp
        for members in ((attention.q, attention.k, attention.v), (mlp.up, mlp.gate)):
            here = [layer for layer in members if layer is not None and rest.pop(id(layer), None) is not None]
            made += [here] if here else []
    return made + [[layer] for layer in rest.values()]


def neighbour(model: Any, block: Any, members: list[nn.Linear]) -> list[Tensor] | None:
    """Return what of a block gives these layers their inputs, and nothing else, row by row; None: there is no such thing."""
    attention, mlp, cfg = block.attention, block.mlp, model.cfg
    if attention.o in members and attention.v.out_features == attention.o.in_features:
        return _rows_of(attention.v)
    if mlp.down in members and (mlp.gate is not None or mlp.activation == "relu"):
        return _rows_of(mlp.up)
    before = cfg.kind == "decoder"                       # an encoder's norms feed the residual stream, too
    if before and attention.q in members and {*members} == {attention.q, attention.k, attention.v}:
        return _rows_of(block.norm1)
    if before and mlp.up in members and {*members} == {x for x in (mlp.up, mlp.gate) if x is not None}:
        return _rows_of(block.norm2)
    return None


def _rows_of(layer: Any) -> list[Tensor] | None:
    """Return weight and bias of a layer that is not packed."""
    if "weight" not in layer._parameters:
        return None
    return [layer.weight, *([layer.bias] if getattr(layer, "bias", None) is not None else [])]

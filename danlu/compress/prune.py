"""Fewer weights: zeros in place of those that matter least, or heads, hidden units and blocks taken out whole.

O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from danlu.adapt.targets import linears
from danlu.compress import rows, structure
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.nn import forms, packed
from danlu.words import _

Method = Literal["magnitude", "wanda", "2:4", "heads", "ffn", "layers"]


class Prune(Model):
    """What is taken out of a model.

    magnitude: the smallest weights of each matrix; wanda: in each row, the smallest times the norm of what they are given
    (Sun et al., 2023); 2:4: two of every four in a row; heads, ffn, layers: whole heads of attention, hidden units of the
    feed-forward part, blocks.
    """

    method: Method = Field("magnitude", description="What is taken out.")
    sparsity: float = Field(0.5, gt=0, lt=1, allow_inf_nan=False, description="Share that is taken out.")
    keep: tuple[str, ...] = Field((), description="Layers that stay as they are.")
    also: tuple[str, ...] = Field((), description="Layers beside, such as heads of tasks, which else stay as they are.")


@torch.no_grad()
def prune(model: Any, how: Prune, given: rows.Rows | None = None) -> Any:
    """Return `model` pruned, changed in place but where its config is another: a new one then.

    given: calibration rows, which wanda and layers need, and 2:4, heads and ffn judge by if there are any.
    """
    assert not model.training, "dropout would blur what the layers are given: call model.eval() first"
    if any(packed.is_packed(layer) for layer in model.modules()):
        raise ConfigError(_("the weights are packed already"), fix=_("start from the model that they were packed from"))
    if how.method in ("heads", "ffn", "layers"):
        return structure.smaller(model, how.method, how.sparsity, given)
    if how.method == "2:4" and how.sparsity != 0.5:
        raise ConfigError(_("2:4 takes out half of the weights"), where="--sparsity", fix="--sparsity 0.5")
    layers = linears(model, keep=how.keep, also=how.also)
    if how.method == "wanda":
        rows.needed(given, "wanda")
    if how.method == "magnitude" or not given:
        for layer in layers.values():
            layer.weight.mul_(mask(layer.weight, how))
        return model
    for stage in rows.stages(model, layers, given):
        found = rows.moments(stage.layers, stage.run)
        for name, layer in stage.layers.items():
            layer.weight.mul_(mask(layer.weight, how, found[name].norms))
    return model


def mask(weight: Tensor, how: Prune, norms: Tensor | None = None) -> Tensor:
    """Return which weights [O, I] stay, as a mask.  norms [I]: of what each column is given (wanda, 2:4)."""
    score = weight.abs() if norms is None else weight.abs() * norms.to(weight.device)
    if how.method == "2:4":
        return two_of_four(score)
    if how.method == "wanda":                            # compared within a row, as the paper does
        drop = score.argsort(dim=1, stable=True)[:, : round(how.sparsity * weight.shape[1])]
        return torch.ones_like(weight, dtype=torch.bool).scatter_(1, drop, False)
    return without(score, round(how.sparsity * weight.numel()))


def without(score: Tensor, count: int) -> Tensor:
    """Return a mask [O, I] that leaves out the `count` smallest; of equal ones the first."""
    drop = score.flatten().argsort(stable=True)[:count]
    return torch.ones(score.numel(), dtype=torch.bool, device=score.device).index_fill_(0, drop, False).view(score.shape)


def two_of_four(score: Tensor) -> Tensor:
    """Return a mask [O, I] that keeps the two largest of every four in a row; of what is left at its end, all."""
    whole = score.shape[1] // 4 * 4
    fours = score[:, :whole].unflatten(1, (-1, 4))
    best = fours.argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, best, True)
    return torch.cat((kept.flatten(1), torch.ones_like(score[:, whole:], dtype=torch.bool)), 1)


def sparse(model: Any, dtype: torch.dtype = torch.float32) -> forms.Table:
    """Return the forms of the layers that are smaller as a mask and the weights that are left: those of many zeros."""
    table: list[tuple[str, forms.Bits]] = []
    for name, layer in linears(model, also=("*",)).items():
        form = forms.Bits(count=int(layer.weight.count_nonzero()), dtype=str(dtype).removeprefix("torch."))     # type: ignore[arg-type]
        if sum(part.bytes for part in form.parts(*layer.weight.shape).values()) < layer.weight.numel() * dtype.itemsize:
            table.append((name, form))
    return table

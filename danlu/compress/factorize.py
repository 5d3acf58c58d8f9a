"""Matrices as products of two thin ones: by their largest singular values, or by those of what they make of their inputs.

O outputs, I inputs, r rank.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from danlu.adapt.targets import linears
from danlu.compress import rows
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.nn import forms, packed
from danlu.words import _

DAMPING = 1e-6                                           # of the mean second moment, added to each


class Factorize(Model):
    """How thin the two matrices are that take the place of one.

    With calibration rows the error is that of what a layer says of them (as in SVD-LLM, Wang et al., 2024), else that of its
    weight.
    """

    rank: int | Literal["auto"] = Field("auto", description="Of every layer, or each layer's by `error`.")
    error: float = Field(0.1, gt=0, lt=1, allow_inf_nan=False, description="Norm of the error over that of the whole, most.")
    keep: tuple[str, ...] = Field((), description="Layers that stay as they are.")
    also: tuple[str, ...] = Field((), description="Layers beside, such as heads of tasks, which else stay as they are.")


class Thin(NamedTuple):
    """The two matrices, and what they lose."""

    up: Tensor                                           # [O, r]
    down: Tensor                                         # [r, I]
    error: float                                         # norm of what is lost over that of the whole


@torch.no_grad()
def factorize(model: Any, how: Factorize, given: rows.Rows | None = None) -> dict[str, Thin]:
    """Replace the linear layers of `model`, in place, that have fewer numbers as two matrices; return these by name.

    Raises ConfigError if there is no such layer.
    """
    assert not model.training, "dropout would blur what the layers are given: call model.eval() first"
    if any(packed.is_packed(layer) for layer in model.modules()):
        raise ConfigError(_("the weights are packed already"), fix=_("start from the model that they were packed from"))
    layers, done = linears(model, keep=how.keep, also=how.also), dict[str, Thin]()
    todo = rows.stages(model, layers, given) if given else iter([rows.Stage(layers, lambda: None)])
    for stage in todo:
        found = rows.moments(stage.layers, stage.run) if given else {}
        for name, layer in stage.layers.items():
            thin = split(layer.weight, how, found.get(name))
            if thin is not None:
                packed.become(layer, forms.Low(rank=len(thin.down)), {"up": thin.up, "down": thin.down})
                done[name] = thin
    if not done:
        raise ConfigError(_("no layer would have fewer numbers"), where="--rank",
                          fix=_("name a smaller --rank, or allow a larger --error"))
    return done


def split(weight: Tensor, how: Factorize, moment: rows.Moments | None = None) -> Thin | None:
    """Return `weight` [O, I] as two matrices that are nearest to it of their rank; None: they would have no fewer numbers.

    Nearest by the Frobenius norm (Eckart and Young, 1936): of the weight, or of what it makes of the inputs of `moment`.
    """
    w, root = weight.double(), None
    if moment is not None:
        h = moment.products.clone()
        h.diagonal().add_(DAMPING * h.diagonal().mean() + 1e-30)
        root = torch.linalg.cholesky(h)                  # [I, I]; the norm of W·root is that of W·x over all tokens
    left, sizes, right = torch.linalg.svd(w if root is None else w @ root, full_matrices=False)
    lost = sizes.square().flip(0).cumsum(0).flip(0)      # [min(O, I)]: what is lost if all from here on are left out
    shares = torch.cat((lost, lost.new_zeros(1))).div(lost[0].clamp(min=1e-300)).sqrt()
    rank = int((shares > how.error).sum()) if how.rank == "auto" else min(how.rank, len(sizes))
    rank = max(1, rank)
    if rank * sum(weight.shape) >= weight.numel():
        return None
    even = sizes[:rank].sqrt()                           # shared out, so that both learn alike
    down = even[:, None] * right[:rank]
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return Thin((left[:, :rank] * even).float(), down.float(), float(shares[rank]))

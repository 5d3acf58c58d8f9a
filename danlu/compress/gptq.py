"""GPTQ: weights rounded one column after the other, each error made good by the columns that follow (Frantar et al., 2022).

O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.compress.rows import Moments, error
from danlu.nn.forms import Int4, Int8

DAMPING = 0.01                                           # of the mean second moment, added to each
COLUMNS = 128                                            # whose errors are made good at a time in all that follow


def gptq(weight: Tensor, moment: Moments, form: Int8 | Int4) -> dict[str, Tensor]:
    """Return the parts of `weight` [O, I] in `form` that change least what the layer says, or those rounded to nearest where
    they change less."""
    nearest = form.pack(weight)
    try:
        made = _gptq(weight, moment, form)
    except torch.linalg.LinAlgError:                     # of inputs that are not finite, or far from independent
        return nearest
    columns = weight.shape[1]
    better = error(form.dense(made, columns) - weight, moment) <= error(form.dense(nearest, columns) - weight, moment)
    return made if better else nearest


def _gptq(weight: Tensor, moment: Moments, form: Int8 | Int4) -> dict[str, Tensor]:
    w = weight.detach().double().clone()
    columns = w.shape[1]
    chain = _chain(moment.products)                      # [I, I] upper: how much of an error each later column takes over
    step = form.group if isinstance(form, Int4) else COLUMNS
    grids = [form.grid(weight)] if isinstance(form, Int8) else []
    codes = torch.empty(w.shape, dtype=torch.uint8 if isinstance(form, Int4) else torch.int8)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        if isinstance(form, Int4):                       # the grid of a group is that of its weights as they are by now
            grids.append(form.grid(w[:, start:stop].float()))
        errors = torch.empty(len(w), stop - start, dtype=torch.float64)
        for j in range(start, stop):
            codes[:, j] = form.nearest(w[:, j, None].float(), grids[-1])[:, 0]
            errors[:, j - start] = (w[:, j] - form.value(codes[:, j, None], grids[-1])[:, 0].double()) / chain[j, j]
            w[:, j + 1 : stop] -= errors[:, j - start, None] * chain[j, j + 1 : stop]
        w[:, stop:] -= errors @ chain[start:stop, stop:]
    return {"codes": form.stored(codes), "scales": torch.cat(grids)}


def _chain(products: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the second moments, damped."""
    h = products.clone()
    dead = h.diagonal() == 0
    h.diagonal().add_(DAMPING * h.diagonal().mean()).masked_fill_(dead, 1.0)
    lower = torch.linalg.cholesky(h)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

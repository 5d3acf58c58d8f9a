"""LAMB: Adam whose step, tensor by tensor, is as long as the parameter (You et al., 2020, algorithm 2, phi(z) = z)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from danlu.config import Model
from danlu.optim.groups import Betas, Decay, Epsilon, LayerDecay, Named, Rate, by_dimension


class LAMB(Model):
    """For very large batches: an Adam direction, rescaled in each tensor to the norm of the parameter."""

    kind: Literal["lamb"] = "lamb"
    lr: Rate = 2e-3
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.01
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-6
    rescale: Literal["matrices", "all"] = Field(
        default="matrices",
        description="Which tensors take the trust ratio: the paper's algorithm says all; its authors' code leaves "
        "biases and norms out, for which the ratio would be tiny while they are near 0.",
    )

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, self.weight_decay)
        for g in groups:
            g["rescale"] = self.rescale == "all" or g["params"][0].ndim >= 2
        return LAMBOptimizer(groups, {"lr": self.lr, "betas": self.betas, "eps": self.eps})


class LAMBOptimizer(Optimizer):
    """State of each parameter: step, exp_avg, exp_avg_sq."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is not None:
                    p.sub_(self._update(p, p.grad, g), alpha=g["lr"])
        return loss

    def _update(self, p: Tensor, grad: Tensor, g: dict[str, Any]) -> Tensor:
        """Return what lr multiplies, after moving the running means of `p`."""
        state = self.state[p]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        t = float(state["step"])
        beta1, beta2 = g["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root: Tensor = (square / (1 - beta2**t)).sqrt_().add_(g["eps"])
        update: Tensor = (mean / (1 - beta1**t)).div_(root).add_(p, alpha=g["weight_decay"])
        if g["rescale"]:
            length, stride = p.norm(), update.norm()
            trust = torch.where((length > 0) & (stride > 0), length / stride, torch.ones_like(length))
            update.mul_(trust)
        return update

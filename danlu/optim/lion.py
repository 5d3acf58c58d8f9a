"""Lion: the sign of an interpolated momentum (Chen et al., 2023, algorithm 2).  Half the state of Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from danlu.config import Model
from danlu.optim.groups import Betas, Decay, LayerDecay, Named, Rate, by_dimension


class Lion(Model):
    """Every weight moves by lr up or down; use 3 to 10 times less lr and more weight decay than with AdamW."""

    kind: Literal["lion"] = "lion"
    lr: Rate = 1e-4
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.3
    betas: Betas = (0.9, 0.99)

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        return LionOptimizer(by_dimension(named, self.weight_decay), {"lr": self.lr, "betas": self.betas})


class LionOptimizer(Optimizer):
    """State of each parameter: exp_avg."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        for g in self.param_groups:
            beta1, beta2 = g["betas"]
            for p in g["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                mean = state["exp_avg"]
                direction = mean.lerp(p.grad, 1 - beta1).sign_()
                p.mul_(1 - g["lr"] * g["weight_decay"]).sub_(direction, alpha=g["lr"])
                mean.lerp_(p.grad, 1 - beta2)
        return loss

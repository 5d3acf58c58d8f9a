"""Optimizers that torch has: each class here is a configuration whose `build(named)` returns torch's own, grouped.

Where torch has a fused kernel for the device it is used; the formulas are the papers' and do not depend on that.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch.optim import Optimizer

from danlu.config import Model
from danlu.optim.groups import Betas, Decay, Epsilon, LayerDecay, Named, Rate, Share, by_dimension, fused
from danlu.words import _

Mass = Annotated[float, Field(gt=0, lt=1, description="Share of the last update that carries over.")]


class GD(Model):
    """Steps down the gradient: p -= lr * g.  It is gradient descent proper when a step holds the whole data set."""

    kind: Literal["gd"] = "gd"
    lr: Rate = 0.1
    layer_decay: LayerDecay = 1.0

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, 0.0)
        return torch.optim.SGD(groups, lr=self.lr, fused=fused(groups))


class SGD(Model):
    """Stochastic gradient descent (Robbins and Monro, 1951); weight decay in the gradient, momentum if asked for."""

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 0.1
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.0
    momentum: Share = Field(default=0.0, description="Share of the last update that carries over; 0 = none.")
    dampening: Share = Field(default=0.0, description="Share of the gradient kept out of the momentum.")
    nesterov: bool = Field(default=False, description="Look ahead along the momentum.")

    @model_validator(mode="after")
    def _momentum_given(self) -> SGD:
        if self.momentum == 0 and (self.nesterov or self.dampening):
            raise ValueError(_("nesterov and dampening do nothing without momentum; set momentum, for example 0.9"))
        if self.nesterov and self.dampening:
            raise ValueError(_("nesterov needs dampening=0"))
        return self

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, self.weight_decay)
        return torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            nesterov=self.nesterov,
            fused=fused(groups),
        )


class Momentum(Model):
    """Heavy ball: v = m*v + g, p -= lr * v (Polyak, 1964)."""

    kind: Literal["momentum"] = "momentum"
    lr: Rate = 0.01
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.0
    momentum: Mass = 0.9

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, fused=fused(groups))


class Nesterov(Model):
    """Accelerated gradient: v = m*v + g, p -= lr * (g + m*v) (Nesterov, 1983; this form: Sutskever et al., 2013)."""

    kind: Literal["nesterov"] = "nesterov"
    lr: Rate = 0.01
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.0
    momentum: Mass = 0.9

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True, fused=fused(groups))


class Adagrad(Model):
    """Divides by the root of the sum of all squared gradients (Duchi et al., 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    lr: Rate = 0.01
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.0
    eps: Epsilon = 1e-10
    initial: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Where the sum of squares begins.")

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, self.weight_decay)
        return torch.optim.Adagrad(
            groups,
            lr=self.lr,
            eps=self.eps,
            initial_accumulator_value=self.initial,
            fused=fused(groups, devices=("cpu",)),
        )


class RMSprop(Model):
    """Divides by the root of the running mean of squared gradients (Tieleman and Hinton, 2012)."""

    kind: Literal["rmsprop"] = "rmsprop"
    lr: Rate = 1e-3
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.0
    alpha: Share = Field(default=0.99, description="Decay of the running mean of squares.")
    eps: Epsilon = 1e-8
    momentum: Share = Field(default=0.0, description="Share of the last update that carries over; 0 = none.")
    centered: bool = Field(default=False, description="Subtract the squared mean gradient (Graves, 2013).")

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        return torch.optim.RMSprop(
            by_dimension(named, self.weight_decay),
            lr=self.lr,
            alpha=self.alpha,
            eps=self.eps,
            momentum=self.momentum,
            centered=self.centered,
        )


class Adam(Model):
    """Adaptive moments, weight decay added to the gradient (Kingma and Ba, 2015)."""

    kind: Literal["adam"] = "adam"
    lr: Rate = 3e-4
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.0
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, self.weight_decay)
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused(groups))


class AdamW(Model):
    """Adaptive moments, weight decay apart from the gradient (Loshchilov and Hutter, 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: Rate = 3e-4
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.1
    betas: Betas = (0.9, 0.95)
    eps: Epsilon = 1e-8

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        groups = by_dimension(named, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused(groups))


class Adafactor(Model):
    """Second moments kept as row and column means: memory of one copy less (Shazeer and Stern, 2018).

    The step is relative to the size of the parameter, and never longer than 1/sqrt(step) whatever the schedule says.
    """

    kind: Literal["adafactor"] = "adafactor"
    lr: Rate = 1e-2
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.0
    beta2_decay: float = Field(
        default=-0.8, lt=0, allow_inf_nan=False, description="Exponent of the decay of the squares: 1 - step**this."
    )
    smallest: Epsilon = Field(default=1e-3, description="A parameter counts as at least this large (root mean square).")
    clip: float = Field(default=1.0, ge=1, allow_inf_nan=False, description="Largest root mean square of an update.")

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters."""
        return torch.optim.Adafactor(
            by_dimension(named, self.weight_decay),
            lr=self.lr,
            beta2_decay=self.beta2_decay,
            eps=(None, self.smallest),
            d=self.clip,
        )

"""Muon for the matrices inside the blocks, AdamW for the rest, as one optimizer.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal one, found by a few
Newton-Schulz steps.  Matrices of equal shape (query, key, value of every block) take them together, as one stack.
S matrices in a stack, m rows <= n columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from danlu.config import Model
from danlu.errors import ConfigError
from danlu.optim.groups import Betas, Decay, Epsilon, LayerDecay, Named, Rate, Share, fused, group, trained
from danlu.words import _

Polynomial = tuple[float, float, float]  # (a, b, c): one step maps a singular value s to a*s + b*s^3 + c*s^5

# Jordan et al.: one polynomial, steep at 0; after 5 steps singular values lie in about [0.7, 1.2] rather than at 1.
JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)
# Polar Express (Amsel et al., 2025): each step the best one after those before it, for singular values of at least
# 0.001; the input must be 2 % shorter than 1.
POLAR: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
STACK = 1 << 22  # most elements in one stack: beyond the caches, longer stacks bring nothing and cost memory


class Muon(Model):
    """Orthogonal updates for hidden matrices, AdamW at `adam_lr` for embeddings, the head, biases and norms."""

    kind: Literal["muon"] = "muon"
    lr: Rate = 0.01
    layer_decay: LayerDecay = 1.0
    weight_decay: Decay = 0.1
    momentum: Share = Field(default=0.95, description="Decay of the running mean of the gradient of hidden matrices.")
    nesterov: bool = Field(default=True, description="Look ahead along the momentum.")
    ns_steps: int = Field(default=5, ge=1, lt=100, description="Newton-Schulz steps.")
    ns_polynomial: Literal["jordan", "polar_express"] = Field(
        default="jordan",
        description="One polynomial in every step, or one made for each: with polar_express 3 steps do the work of 5.",
    )
    adjust: Literal["original", "match_rms_adamw"] = Field(
        default="original",
        description="Factor on lr by shape: sqrt(max(1, rows/columns)), or 0.2*sqrt(max(rows, columns)), with which lr "
        "is of the size one would give AdamW.",
    )
    ns_precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Arithmetic of the Newton-Schulz steps: auto = bf16 on a GPU, fp32 on a CPU."
    )
    adam_lr: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Learning rate of everything else; that of Muon if absent."
    )
    adam_betas: Betas = (0.9, 0.95)
    adam_eps: Epsilon = 1e-8

    def build(self, named: Named) -> Optimizer:
        """Return the optimizer of these parameters.  Raises ConfigError if none is a matrix inside a block."""
        pairs = trained(named)
        inner = [(n, p) for n, p in pairs if hidden(n, p)]
        outer = [(n, p) for n, p in pairs if not hidden(n, p)]
        if not inner:
            raise ConfigError(
                _("muon found no matrix inside `blocks` to work on"),
                where="optim.kind",
                fix=_("set optim.kind to adamw"),
            )
        precision = self.ns_precision
        if precision == "auto":
            precision = "fp32" if inner[0][1].device.type == "cpu" else "bf16"
        muon: dict[str, Any] = {
            "method": "muon",
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "ns_steps": self.ns_steps,
            "ns_polynomial": self.ns_polynomial,
            "ns_precision": precision,
            "adjust": self.adjust,
        }
        scale = 1.0 if self.adam_lr is None else self.adam_lr / self.lr
        adam: dict[str, Any] = {"method": "adamw", "betas": self.adam_betas, "eps": self.adam_eps, "scale": scale}
        matrices, vectors = [(n, p) for n, p in outer if p.ndim >= 2], [(n, p) for n, p in outer if p.ndim < 2]
        groups = [
            group(inner, weight_decay=self.weight_decay, **muon),
            group(matrices, weight_decay=self.weight_decay, **adam),
            group(vectors, weight_decay=0.0, **adam),
        ]
        for g in groups[1:]:
            g["fused"] = fused([g])
        return MuonOptimizer([g for g in groups if g["params"]], self.lr)


def hidden(name: str, parameter: Tensor) -> bool:
    """Return whether Muon moves this parameter: a matrix of a block, not an embedding, a position table or the head."""
    return parameter.ndim == 2 and "blocks" in name.split(".")


class MuonOptimizer(Optimizer):
    """State: momentum_buffer for a hidden matrix; step, exp_avg, exp_avg_sq for any other parameter."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        for g in self.param_groups:
            g["lr"] = lr * g["scale"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        for g in self.param_groups:
            moving = [p for p in g["params"] if p.grad is not None]
            if moving and g["method"] == "muon":
                self._orthogonal(moving, g)
            elif moving:
                self._adaptive(moving, g)
        return loss

    def _orthogonal(self, moving: list[Tensor], g: dict[str, Any]) -> None:
        """Move hidden matrices by their orthogonalised momentum."""
        for p in moving:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        for stack in stacks(moving):
            grads = [p.grad for p in stack if p.grad is not None]
            means = [self.state[p]["momentum_buffer"] for p in stack]
            torch._foreach_lerp_(means, grads, 1 - g["momentum"])
            ahead = torch._foreach_lerp(grads, means, g["momentum"]) if g["nesterov"] else means
            batch = torch.stack([lying(u) for u in ahead])  # [S, m, n]
            dtype = torch.bfloat16 if g["ns_precision"] == "bf16" else torch.promote_types(batch.dtype, torch.float32)
            updates = orthogonalise(batch.to(dtype), polynomials(g["ns_polynomial"], g["ns_steps"]))
            torch._foreach_mul_(stack, 1 - g["lr"] * g["weight_decay"])
            for p, update in zip(stack, updates.unbind(0), strict=True):
                rows, columns = p.shape
                back = update.T if rows > columns else update
                p.add_(back.to(p.dtype), alpha=-g["lr"] * adjustment(g["adjust"], rows, columns))

    def _adaptive(self, moving: list[Tensor], g: dict[str, Any]) -> None:
        """Move the rest by torch's own AdamW."""
        for p in moving:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if g["fused"] else "cpu")
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in moving]
        adamw(
            moving,
            [p.grad for p in moving if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=g["fused"],
            amsgrad=False,
            beta1=g["betas"][0],
            beta2=g["betas"][1],
            lr=g["lr"],
            weight_decay=g["weight_decay"],
            eps=g["eps"],
            maximize=False,
        )


def lying(matrix: Tensor) -> Tensor:
    """Return the matrix lying on its side: rows <= columns."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of matrices that have one shape when lying on their sides, at most STACK elements in a list."""
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for matrix in matrices:
        shapes.setdefault((min(matrix.shape), max(matrix.shape)), []).append(matrix)
    for (m, n), same in shapes.items():
        most = max(1, STACK // (m * n))
        for start in range(0, len(same), most):
            yield same[start : start + most]


def adjustment(rule: str, rows: int, columns: int) -> float:
    """Return the factor on the learning rate of a matrix (`match_rms_adamw`: Liu et al., 2025)."""
    return math.sqrt(max(1.0, rows / columns)) if rule == "original" else 0.2 * math.sqrt(max(rows, columns))


def polynomials(rule: str, steps: int) -> list[Polynomial]:
    """Return the polynomial of each step; beyond the table its last one goes on."""
    return [JORDAN if rule == "jordan" else POLAR[min(step, len(POLAR) - 1)] for step in range(steps)]


def orthogonalise(x: Tensor, steps: list[Polynomial]) -> Tensor:
    """Return each [m, n] matrix of x [S, m, n], m <= n, with its singular values pushed to about 1.

    One step is X <- P X with P = aI + bA + cA^2 and A = X X^T.  In fp32 a long matrix takes its steps on A alone,
    A <- P A P and Q <- P Q, and X <- Q X once at the end: products of m^3 instead of m^2 n.  bf16 would lose the
    small singular values that way, since A holds their squares.
    """
    room = 1.02 if steps[0] == POLAR[0] else 1.0
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * room).clamp(min=1e-7)
    if x.dtype == torch.bfloat16 or x.shape[-1] < 2 * x.shape[-2]:
        for a, b, c in steps:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram = x @ x.mT
    product = None
    for number, (a, b, c) in enumerate(steps, 1):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        if number < len(steps):
            gram = p @ (gram @ p)
    assert product is not None
    return product @ x

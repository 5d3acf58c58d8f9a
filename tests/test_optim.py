"""Every optimizer against its paper's formula in NumPy at double precision, and against itself after a stop."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import nn

from danlu.errors import ConfigError
from danlu.optim import (
    GD,
    LAMB,
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    Momentum,
    Muon,
    Nesterov,
    Optim,
    Optimizers,
    RMSprop,
    set_rate,
)
from danlu.optim.muon import JORDAN, POLAR, orthogonalise, polynomials

Array = NDArray[np.float64]
Formula = Callable[[Optim, Array, Iterator[Array], bool], Array]
STEPS = 7
SHAPE = {
    "blocks.0.q.weight": (6, 6),
    "blocks.0.up.weight": (12, 4),
    "blocks.0.norm.weight": (5,),
    "embed.weight": (9, 3),
}


# The formulas.  c = the configuration, p = the parameter, gs = its gradients, inner = Muon moves it.


def decay(c: Any, p: Array) -> float:
    return c.weight_decay if p.ndim >= 2 and "weight_decay" in type(c).model_fields else 0.0


def descent(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    momentum, nesterov = getattr(c, "momentum", 0.0), isinstance(c, Nesterov) or getattr(c, "nesterov", False)
    v = None
    for raw in gs:
        g = raw + decay(c, p) * p
        v = g if v is None else momentum * v + (1 - getattr(c, "dampening", 0.0)) * g
        p = p - c.lr * (g + momentum * v if nesterov else v)
    return p


def adagrad(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    total = np.full_like(p, c.initial)
    for raw in gs:
        g = raw + decay(c, p) * p
        total = total + g * g
        p = p - c.lr * g / (np.sqrt(total) + c.eps)
    return p


def rmsprop(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    square, mean, v = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for raw in gs:
        g = raw + decay(c, p) * p
        square = c.alpha * square + (1 - c.alpha) * g * g
        mean = c.alpha * mean + (1 - c.alpha) * g
        variance = square - mean**2 if c.centered else square
        v = c.momentum * v + g / (np.sqrt(variance) + c.eps)
        p = p - c.lr * v
    return p


def adaptive(
    p: Array,
    gs: Iterator[Array],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    coupled: float = 0.0,
    decoupled: float = 0.0,
    trust: bool = False,
) -> Array:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, raw in enumerate(gs, 1):
        g = raw + coupled * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        r = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decoupled * p
        size, length = np.linalg.norm(p.ravel()), np.linalg.norm(r.ravel())
        p = p - lr * (size / length if trust and size > 0 and length > 0 else 1.0) * r
    return p


def adam(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    return adaptive(p, gs, lr=c.lr, betas=c.betas, eps=c.eps, coupled=decay(c, p))


def adamw(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    return adaptive(p, gs, lr=c.lr, betas=c.betas, eps=c.eps, decoupled=decay(c, p))


def lamb(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    trust = c.rescale == "all" or p.ndim >= 2
    return adaptive(p, gs, lr=c.lr, betas=c.betas, eps=c.eps, decoupled=decay(c, p), trust=trust)


def adafactor(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    rms: Callable[[Array], float] = lambda x: float(np.sqrt(np.mean(x * x)))  # noqa: E731
    row = col = square = 0.0
    for t, g in enumerate(gs, 1):
        keep, squares = 1 - t**c.beta2_decay, g * g
        if p.ndim >= 2:
            row = keep * row + (1 - keep) * squares.mean(-1, keepdims=True)
            col = keep * col + (1 - keep) * squares.mean(-2, keepdims=True)
            v = row * col / row.mean(-2, keepdims=True)  # type: ignore[attr-defined]
        else:
            v = square = keep * square + (1 - keep) * squares
        u = g / np.sqrt(v)
        u = u / max(1.0, rms(u) / c.clip)
        step = max(c.smallest, rms(p)) * min(c.lr, 1 / math.sqrt(t))
        p = p * (1 - c.lr * decay(c, p)) - step * u
    return p


def lion(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    m = np.zeros_like(p)
    for g in gs:
        p = p - c.lr * (np.sign(c.betas[0] * m + (1 - c.betas[0]) * g) + decay(c, p) * p)
        m = c.betas[1] * m + (1 - c.betas[1]) * g
    return p


def newton_schulz(x: Array, steps: int, rule: str = "jordan") -> Array:
    """By singular values: each step maps s to a*s + b*s^3 + c*s^5."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / max(1e-7, float(np.sqrt((s * s).sum()))) / (1.0 if rule == "jordan" else 1.02)
    for step in range(steps):
        a, b, c = JORDAN if rule == "jordan" else POLAR[min(step, 4)]
        s = a * s + b * s**3 + c * s**5
    return np.asarray((u * s) @ vt)


def muon(c: Any, p: Array, gs: Iterator[Array], inner: bool) -> Array:
    if not inner:
        return adaptive(p, gs, lr=c.adam_lr or c.lr, betas=c.adam_betas, eps=c.adam_eps, decoupled=decay(c, p))
    rows, columns = p.shape
    factor = math.sqrt(max(1, rows / columns)) if c.adjust == "original" else 0.2 * math.sqrt(max(rows, columns))
    m = np.zeros_like(p)
    for g in gs:
        m = c.momentum * m + (1 - c.momentum) * g
        u = (1 - c.momentum) * g + c.momentum * m if c.nesterov else m
        p = p * (1 - c.lr * c.weight_decay) - c.lr * factor * newton_schulz(u, c.ns_steps, c.ns_polynomial)
    return p


CASES: list[tuple[Optim, Formula]] = [
    (GD(lr=0.1), descent),
    (SGD(lr=0.1, weight_decay=0.2), descent),
    (SGD(lr=0.1, momentum=0.8, dampening=0.3), descent),
    (SGD(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1), descent),
    (Momentum(lr=0.05, weight_decay=0.1), descent),
    (Nesterov(lr=0.05, weight_decay=0.1), descent),
    (Adagrad(lr=0.1, weight_decay=0.1, initial=0.1), adagrad),
    (RMSprop(lr=0.02, weight_decay=0.1), rmsprop),
    (RMSprop(lr=0.02, momentum=0.7, centered=True), rmsprop),
    (Adam(lr=0.05, weight_decay=0.1), adam),
    (AdamW(lr=0.05, weight_decay=0.3), adamw),
    (Adafactor(lr=0.05, weight_decay=0.1), adafactor),
    (Adafactor(lr=0.9, clip=1.2, smallest=0.1, beta2_decay=-0.5), adafactor),
    (LAMB(lr=0.05, weight_decay=0.1), lamb),
    (LAMB(lr=0.05, weight_decay=0.1, rescale="all"), lamb),
    (Lion(lr=0.02, weight_decay=0.5), lion),
    (Muon(lr=0.05, adam_lr=0.01, weight_decay=0.2), muon),
    (Muon(lr=0.05, adjust="match_rms_adamw", nesterov=False, ns_steps=3), muon),
    (Muon(lr=0.05, ns_polynomial="polar_express", ns_steps=3), muon),
]
EACH = pytest.mark.parametrize("config", [c for c, _f in CASES], ids=lambda c: c.kind)


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, nn.Parameter]:
    rng = np.random.default_rng(seed)
    return {name: nn.Parameter(torch.tensor(rng.normal(size=shape)).to(dtype)) for name, shape in SHAPE.items()}


def gradients(seed: int = 1) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape) for name, shape in SHAPE.items()} for _step in range(STEPS)]


def walk(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: list[dict[str, Array]]) -> None:
    for grads in steps:
        for name, p in named.items():
            p.grad = torch.tensor(grads[name]).to(p.dtype)
        optimizer.step()


def flatten(named: dict[str, nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.detach().ravel() for p in named.values()])


def sha256(named: dict[str, nn.Parameter]) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in named.values())).hexdigest()


@pytest.mark.parametrize(("config", "formula"), CASES, ids=[c.kind for c, _f in CASES])
def test_follows_the_formula_of_its_paper(config: Optim, formula: Formula) -> None:
    named = parameters()
    start = {name: p.detach().numpy().copy() for name, p in named.items()}
    walk(named, config.build(named.items()), gradients())
    for name, p in named.items():
        inner = name.startswith("blocks") and p.ndim == 2
        expected = formula(config, start[name], (g[name] for g in gradients()), inner)
        assert np.abs(expected - start[name]).max() > 1e-3
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-9, err_msg=name)


@EACH
def test_a_stop_and_a_reload_change_nothing(config: Optim) -> None:
    """State passes through tensors and JSON only, as in a checkpoint, and the continuation is equal to the bit."""
    straight = parameters(torch.float32)
    walk(straight, config.build(straight.items()), gradients()[:6])

    first = parameters(torch.float32)
    optimizer = config.build(first.items())
    walk(first, optimizer, gradients()[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    for slots in saved["state"].values():
        assert all(isinstance(v, torch.Tensor | int | float) for v in slots.values())
    saved["param_groups"] = json.loads(json.dumps(saved["param_groups"]))

    second = parameters(torch.float32, seed=99)
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    resumed = config.build(second.items())
    resumed.load_state_dict(saved)
    walk(second, resumed, gradients()[3:6])
    assert sha256(second) == sha256(straight)
    assert sha256(second) != sha256(first)


@EACH
def test_groups_carry_names_scales_and_no_decay_for_vectors(config: Optim) -> None:
    named = parameters()
    groups = config.build(named.items()).param_groups
    flat = [(n, p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert sorted(n for n, _p in flat) == sorted(named)
    assert all(named[n] is p for n, p in flat)
    for g in groups:
        assert g["scale"] > 0
        assert g["weight_decay"] == (0.0 if g["params"][0].ndim < 2 else getattr(config, "weight_decay", 0.0))
        assert len({p.ndim < 2 for p in g["params"]}) == 1


@EACH
def test_lowers_a_convex_loss(config: Optim) -> None:
    """Least squares on a full batch, with the rate falling to 0."""
    config = config.model_copy(update={"weight_decay": 0.0, "lr": min(config.lr, 0.05)} if config.kind != "gd" else {})
    torch.manual_seed(0)
    named = {
        "blocks.0.weight": nn.Parameter(0.3 * torch.randn(8, 6)),
        "blocks.0.bias": nn.Parameter(torch.zeros(8)),
        "head.weight": nn.Parameter(torch.eye(8) + 0.1 * torch.randn(8, 8)),
    }
    x, target = torch.randn(64, 6), torch.randn(64, 8)
    optimizer = config.build(named.items())
    losses = []
    for step in range(120):
        out = (x @ named["blocks.0.weight"].T + named["blocks.0.bias"]) @ named["head.weight"].detach().T
        loss = (out - target).square().mean() + 0.01 * (named["head.weight"] - torch.eye(8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        set_rate(optimizer, config.lr * (1 - step / 120))
        optimizer.step()
        losses.append(loss.item())
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(64, 1)], 1), target).solution
    floor = (torch.cat([x, torch.ones(64, 1)], 1) @ best - target).square().mean().item()
    assert losses[-1] < losses[0] - 0.5 * (losses[0] - floor)


def test_the_rate_is_set_by_scale() -> None:
    optimizer = Muon(lr=0.02, adam_lr=0.005).build(parameters().items())
    set_rate(optimizer, 0.01)
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["names"]}
    assert rates["blocks.0.q.weight"] == 0.01
    assert rates["embed.weight"] == rates["blocks.0.norm.weight"] == pytest.approx(0.0025)


def test_adamw_is_fused_where_the_kernel_takes_the_parameters() -> None:
    for config in (GD(), SGD(), Momentum(), Nesterov(), Adagrad(), Adam(), AdamW()):
        assert all(g["fused"] for g in config.build(parameters().items()).param_groups)
    meta = {"w": nn.Parameter(torch.empty(2, 2, device="meta"))}
    assert not AdamW().build(meta.items()).param_groups[0]["fused"]


def test_frozen_and_tied_parameters() -> None:
    tied, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2), requires_grad=False)
    groups = AdamW().build([("embed.weight", tied), ("bias", frozen), ("head.weight", tied)]).param_groups
    assert [g["names"] for g in groups] == [["embed.weight"]]
    with pytest.raises(ConfigError, match="frozen"):
        AdamW().build([("bias", frozen)])


@pytest.mark.parametrize("config", [LAMB(), Lion(), Muon()], ids=lambda c: c.kind)
def test_ours_leave_parameters_without_gradient_alone(config: Optim) -> None:
    named = parameters()
    before = named["embed.weight"].detach().clone()
    optimizer = config.build(named.items())
    for name in ("blocks.0.q.weight", "blocks.0.norm.weight"):
        named[name].grad = torch.ones_like(named[name])
    assert optimizer.step(lambda: 2.5) == 2.5
    assert torch.equal(named["embed.weight"], before)
    assert len(optimizer.state) == 2


# LAMB


def test_lamb_steps_as_far_as_the_parameter_is_long() -> None:
    p = nn.Parameter(torch.randn(20, 30, dtype=torch.float64))
    before = p.detach().clone()
    optimizer = LAMB(lr=0.03).build([("w", p)])
    p.grad = torch.randn_like(p) * 1e6
    optimizer.step()
    assert torch.linalg.norm(p - before).item() == pytest.approx(0.03 * torch.linalg.norm(before).item())


# Muon


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 16, 40), (4, 1, 8)])
@pytest.mark.parametrize("steps", [1, 5, 8])
@pytest.mark.parametrize("rule", ["jordan", "polar_express"])
def test_both_ways_to_orthogonalise_map_the_singular_values(shape: tuple[int, int, int], steps: int, rule: str) -> None:
    x = torch.tensor(np.random.default_rng(0).normal(size=shape))
    expected = np.stack([newton_schulz(m, steps, rule) for m in x.numpy()])
    np.testing.assert_allclose(orthogonalise(x, polynomials(rule, steps)).numpy(), expected, atol=1e-10)
    single = orthogonalise(x.float(), polynomials(rule, steps)).double().numpy()
    np.testing.assert_allclose(single, expected, atol=2e-3 if steps == 8 else 2e-4)


@pytest.mark.parametrize(("rule", "low", "high"), [("jordan", 0.45, 1.21), ("polar_express", 0.84, 1.15)])
def test_five_steps_bring_singular_values_near_one(rule: str, low: float, high: float) -> None:
    """Singular values from the norm down to about 0.001 of it; the bounds are the papers' for that interval."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(40, 40)))[0] for _side in range(2))
    x = torch.tensor((u * np.geomspace(2e-3, 1, 40)) @ v)[None]
    s = np.linalg.svd(orthogonalise(x, polynomials(rule, 5))[0].numpy(), compute_uv=False)
    assert low < s.min() < s.max() < high


@pytest.mark.parametrize("shape", [(24, 24), (16, 64)])
def test_a_gradient_of_rank_one_stays_of_rank_one(shape: tuple[int, int]) -> None:
    """The hard case for fp32: all singular values but one are rounding noise, which the steps enlarge."""
    rng = np.random.default_rng(0)
    x = torch.tensor(np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1])))
    done = orthogonalise(x.float()[None], polynomials("jordan", 5))[0]
    assert torch.isfinite(done).all()
    np.testing.assert_allclose(done.double().numpy(), newton_schulz(x.numpy(), 5), atol=5e-3)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_equals_torch(adjust: Any) -> None:
    """torch works matrix by matrix in bf16: our bf16 follows closely, our fp32 within bf16's rounding (2**-8)."""
    shapes = {f"blocks.{i}.{n}": s for i in range(2) for n, s in (("q", (32, 32)), ("up", (96, 32)), ("down", (32, 96)))}
    runs = {}
    for how in ("torch", "bf16", "fp32"):
        rng = np.random.default_rng(0)
        named = {n: nn.Parameter(torch.tensor(rng.normal(size=s), dtype=torch.float32)) for n, s in shapes.items()}
        start = flatten(named)
        optimizer: torch.optim.Optimizer = (
            torch.optim.Muon(list(named.values()), lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
            if how == "torch"
            else Muon(lr=0.02, weight_decay=0.1, adjust=adjust, ns_precision=how).build(named.items())  # type: ignore[arg-type]
        )
        for _step in range(STEPS):
            for p in named.values():
                p.grad = torch.tensor(rng.normal(size=p.shape), dtype=torch.float32)
            optimizer.step()
        runs[how] = flatten(named) - start
    assert (runs["bf16"] - runs["torch"]).norm() < 1e-3 * runs["torch"].norm()
    assert (runs["fp32"] - runs["torch"]).norm() < 2e-2 * runs["torch"].norm()


def test_muon_needs_matrices_in_blocks() -> None:
    with pytest.raises(ConfigError, match=r"set optim\.kind to adamw"):
        Muon().build([("embed.weight", nn.Parameter(torch.ones(4, 4)))])


# Configuration


@pytest.mark.parametrize(
    "config",
    [GD(), SGD(), Momentum(), Nesterov(), Adagrad(), RMSprop(), Adam(), AdamW(), Adafactor(), LAMB(), Lion(), Muon()],
    ids=lambda c: c.kind,
)
def test_the_kind_names_the_class(config: Optim) -> None:
    parsed = TypeAdapter(Optimizers).validate_json(config.model_dump_json(), strict=True)
    assert parsed == config
    assert type(parsed) is type(config)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "adamw", "lr": 0},
        {"kind": "adamw", "lr": math.nan},
        {"kind": "adamw", "lr": math.inf},
        {"kind": "adamw", "betas": (0.9, 1.0)},
        {"kind": "adamw", "eps": 0},
        {"kind": "adamw", "weight_decay": -1},
        {"kind": "adamw", "momentum": 0.9},
        {"kind": "momentum", "momentum": 0.0},
        {"kind": "sgd", "nesterov": True},
        {"kind": "sgd", "momentum": 0.9, "nesterov": True, "dampening": 0.1},
        {"kind": "muon", "ns_steps": 0},
        {"kind": "adamm"},
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Optimizers).validate_python(bad)

"""What training a public model on so many tokens asks of a machine, and what of it cannot be, with the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from danlu.errors import ConfigError
from danlu.models.build import build
from danlu.optim import AdamW
from danlu.planner import amounts
from danlu.planner.hardware import Machine, parse
from danlu.planner.public import Public, flops, parameters
from danlu.rehearse import slots
from danlu.words import _

PER_PARAMETER = 20.0                                     # tokens, where compute is best spent: Hoffmann et al., 2022
YEAR = 365.25 * amounts.DAY


class Large(NamedTuple):
    """What it takes.  Bytes, seconds, FLOPs."""

    model: Public
    machine: Machine
    tokens: float
    length: int
    parameters: int
    flops: float                                         # of the whole training
    precision: str
    states: int                                          # weights, gradients and AdamW's averages, over all devices
    peak: float                                          # seconds if every device reached its peak without a pause
    usual: float                                         # seconds at the share of the peak that training reaches
    deadline: float | None
    budget: float | None

    @property
    def per_token(self) -> float:
        return self.flops / self.tokens

    @property
    def hours(self) -> float:
        """Device-hours at the usual rate."""
        return self.usual / 3600 * self.machine.count

    @property
    def cost(self) -> float | None:
        price = self.machine.device.price
        return None if price is None else price * self.hours

    @property
    def energy(self) -> float:
        """kWh of the devices alone."""
        return self.machine.device.power * self.hours / 1e3

    @property
    def room(self) -> int:
        """Bytes that the devices have for tensors."""
        return self.machine.count * max(0, self.machine.device.memory - self.machine.base)


def optimal(total: float) -> tuple[float, float]:
    """Return the parameters and the tokens on which so many FLOPs are best spent (Hoffmann et al., 2022)."""
    count = math.sqrt(total / (6 * PER_PARAMETER))
    return count, PER_PARAMETER * count


def states(shape: Any) -> int:
    """Return the bytes of weights, gradients and what AdamW keeps, all in fp32 as Danlu trains, without any copies."""
    sizes = {name: tuple(p.shape) for name, p in build(shape).named_parameters()}
    kept = slots(AdamW(), {name: len(shape) for name, shape in sizes.items()})
    return sum(8 * math.prod(shape) + sum(math.prod(slot.at(shape)) * slot.size for slot in kept[name])
               for name, shape in sizes.items())


def large(model: Public, machine: Machine, tokens: float, *, length: int | None = None, deadline: float | None = None,
          budget: float | None = None) -> Large:
    """Return what training `model` from random weights on `tokens` tokens takes.  Raises ConfigError if rows are too long."""
    shape = model.config
    rows = length or shape.context
    if rows > shape.context:
        raise ConfigError(_("{model} reads {context} tokens at once, not {length}").format(
            model=model.name, context=shape.context, length=rows), where="--length", fix=_("lower it"))
    rates = machine.device.flops
    precision = max((name for name in ("bf16", "fp16", "fp32") if name in rates), key=lambda name: rates[name])
    total = flops(shape, rows) * tokens
    return Large(
        model=model, machine=machine, tokens=tokens, length=rows, parameters=parameters(shape), flops=total,
        precision=precision, states=states(shape), peak=total / (rates[precision] * machine.count),
        usual=total / (machine.rate(precision) * machine.count), deadline=deadline, budget=budget)


def impossible(found: Large) -> Iterator[str]:
    """Yield what cannot be, each with its arithmetic."""
    machine, device = found.machine, found.machine.device
    if found.states > found.room:
        each = found.states / found.parameters
        yield _("memory: {n} parameters × {each:.0f} bytes (weights, gradients, two averages of AdamW) = {needed}, and {count} "
                "devices have {room}; at least {least} are needed, before any activation").format(
            n=amounts.told(found.parameters), each=each, needed=amounts.size(found.states), count=machine.count,
            room=amounts.size(found.room), least=math.ceil(found.states / (found.room / machine.count)))
    limit = found.deadline
    if limit is not None and found.peak > limit:
        yield _("time: {flops:.3g} FLOPs ÷ ({count} × {peak:.4g} FLOP/s of {name} in {precision}) = {days} at the peak of every "
                "device without a pause; {limit} would need {share:.0%} of the peak").format(
            flops=found.flops, count=machine.count, peak=device.flops[found.precision], name=device.name,
            precision=found.precision, days=amounts.duration(found.peak), limit=amounts.duration(limit), share=found.peak / limit)
    elif limit is not None and found.usual > limit:
        yield _("time: {days} at {share:.0%} of the peak, as training usually reaches; {limit} would need {needed:.0%}").format(
            days=amounts.duration(found.usual), share=found.peak / found.usual, limit=amounts.duration(limit),
            needed=found.peak / limit)
    if limit is None and found.usual > 2 * YEAR:
        yield _("time: {days} at {share:.0%} of the peak; no machine runs so long").format(
            days=amounts.duration(found.usual), share=found.peak / found.usual)
    if found.budget is not None and found.cost is not None and found.cost > found.budget:
        yield _("money: {hours:,.0f} device-hours × {price:g} = {cost:,.0f}, and the budget is {budget:,.0f}").format(
            hours=found.hours, price=device.price, cost=found.cost, budget=found.budget)


def would_do(found: Large) -> Iterator[str]:
    """Yield what would make it possible, and what to know besides."""
    machine, ratio = found.machine, found.tokens / found.parameters
    share = found.peak / found.usual
    if found.deadline is not None and found.usual > found.deadline:
        count = math.ceil(machine.count * found.usual / found.deadline)
        yield _("{limit} takes {count:,} devices of this kind at {share:.0%} of their peak").format(
            limit=amounts.duration(found.deadline), count=count, share=share)
    if found.budget is not None and found.cost is None:
        yield _("the budget of {budget:,.0f} pays these {hours:,.0f} device-hours at no more than {price:.3g} each; give --price"
                ).format(budget=found.budget, hours=found.hours, price=found.budget / found.hours)
    if found.budget is not None and found.cost is not None and found.cost > found.budget:
        yield _("the budget pays for {tokens} tokens").format(tokens=amounts.told(found.tokens * found.budget / found.cost))
    if ratio < PER_PARAMETER / 2 or ratio > PER_PARAMETER * 2:
        best, seen = optimal(found.flops)
        yield _("{ratio:.3g} tokens a parameter; compute is best spent near {best:g} (Hoffmann et al., 2022, arXiv 2203.15556): "
                "the same FLOPs train about {n} parameters on {tokens} tokens").format(
            ratio=ratio, best=PER_PARAMETER, n=amounts.told(best), tokens=amounts.told(seen))
    node = machine.device.node
    if machine.count > node and machine.count % node:
        yield _("{count} is no multiple of the {node} devices of a node; layouts that cut tensors use {usable}").format(
            count=machine.count, node=node, usable=machine.count // node * node)
    if found.model.note:
        yield _("approximation: {note}").format(note=found.model.note)
    if machine.device.note:
        yield f"{machine.device.name}: {machine.device.note}"


def refuted(model: Public) -> Iterator[str]:
    """Yield what is often told of the model and cannot be, by the same arithmetic."""
    for claim in model.told:
        machine, limit = parse(claim.machine), claim.days * amounts.DAY
        case = large(model, machine, claim.tokens, deadline=limit)
        yield _("often told: {count} × {name} in {days:g} days; that would be {share:.0%} of their peak, which alone takes "
                "{peak}. {truth}").format(count=machine.count, name=machine.device.name, days=claim.days, share=case.peak / limit,
                                  peak=amounts.duration(case.peak), truth=claim.truth)


def record(found: Large) -> dict[str, Any]:
    """Return everything as JSON-ready values."""
    return {
        "model": found.model.name, "parameters": found.parameters, "published": found.model.parameters,
        "source": found.model.source, "approximation": found.model.note or None, "tokens": found.tokens,
        "length": found.length, "flops_per_token": found.per_token, "flops": found.flops, "device": found.machine.device.name,
        "count": found.machine.count, "precision": found.precision, "weights_bytes": 4 * found.parameters,
        "half_weights_bytes": 2 * found.parameters, "states_bytes": found.states, "room_bytes": found.room,
        "seconds_at_peak": found.peak, "seconds": found.usual, "share_of_peak": found.peak / found.usual,
        "device_hours": found.hours, "energy_kwh": found.energy, "cost": found.cost, "deadline": found.deadline,
        "budget": found.budget, "impossible": list(impossible(found)), "advice": list(would_do(found)),
        "refuted": list(refuted(found.model)),
        "sources": [found.model.source, *found.machine.device.sources],
    }


def lines(found: Large) -> Iterator[str]:
    """Yield what is printed."""
    machine, share = found.machine, found.peak / found.usual
    yield _("{name}: {n} parameters, counted by building it ({source})").format(
        name=found.model.name, n=f"{found.parameters:,}", source=found.model.source)
    yield _("{tokens} tokens in rows of {length} × {each:.4g} FLOPs a token = {flops:.3g} FLOPs").format(
        tokens=amounts.told(found.tokens), length=found.length, each=found.per_token, flops=found.flops)
    yield _("{count} × {name}: {peak} at the peak of {precision}, {usual} at {share:.0%} of it, {hours:,.0f} device-hours"
            ).format(
        count=machine.count, name=machine.device.name, peak=amounts.duration(found.peak), precision=found.precision,
        usual=amounts.duration(found.usual), share=share, hours=found.hours)
    yield _("energy of the devices: {kwh:,.0f} kWh; money: {money}").format(
        kwh=found.energy, money=f"{found.cost:,.0f}" if found.cost is not None else _("give --price, of a device-hour"))
    yield _("memory: weights {half} in two bytes each; training {states} over {count} devices that have {room}, "
            "before activations").format(half=amounts.size(2 * found.parameters), states=amounts.size(found.states),
                                         count=machine.count, room=amounts.size(found.room))
    problems = list(impossible(found))
    for line in problems:
        yield _("impossible: {why}").format(why=line)
    if not problems:
        yield _("nothing speaks against it")
    yield from would_do(found)
    yield from refuted(found.model)

"""What a search has found, told: the best plans, what each holds and takes, and the lines to paste."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu import config
from danlu.planner import amounts
from danlu.planner.search import Candidate, Found
from danlu.rehearse import Rehearsal, rehearse
from danlu.words import _

AGREED = 0.03                                            # largest share by which an estimate and its rehearsal may differ


def record(found: Found) -> dict[str, Any]:
    """Return everything as JSON-ready values."""
    return {
        "device": found.machine.device.name, "count": found.machine.count, "looked": found.looked, "traced": found.traced,
        "deadline": found.deadline, "budget": found.budget, "sources": list(found.machine.device.sources),
        "plans": [{
            "changes": list(one.changes), "changes_result": list(one.other), "fits": one.fits, "meets": found.meets(one),
            "world": one.run.layout.world, "layout": config.dump(one.run.layout), "precision": one.run.precision,
            "recompute": one.run.recompute, "memory": dict(one.held._asdict()), "step_seconds": one.pace.step,
            "pace": dict(one.pace._asdict()), "seconds": one.seconds, "cost": one.cost, "energy_kwh": one.energy,
        } for one in found.best],
    }


def lines(found: Found, file: Path | None) -> Iterator[str]:
    """Yield what is printed."""
    machine = found.machine
    yield _("{looked:,} candidates on {count} × {name}, {traced} kinds of them traced; a device has {memory} and a process takes "
            "{base} before any tensor").format(
        looked=found.looked, count=machine.count, name=machine.device.name, traced=found.traced,
        memory=amounts.size(machine.device.memory), base=amounts.size(machine.base))
    if not machine.calibrated:
        yield _("rates: {share:.0%} of the peak in the table (assumed); a measured machine is told by `danlu calibrate`").format(
            share=machine.device.reached)
    for number, one in enumerate(found.best, 1):
        yield from _one(number, one, found)
    yield from _asked(found)
    best = found.best[0]
    if best.fits:
        yield _("to run the first:")
        yield "  danlu train " + " ".join([str(file or "recipe.yaml"), *best.changes])
    if machine.device.note:
        yield f"{machine.device.name}: {machine.device.note}"


def _one(number: int, one: Candidate, found: Found) -> Iterator[str]:
    layout, held, pace = one.run.layout, one.held, one.pace
    axes = " × ".join(f"{name} {getattr(layout, name)}" for name in ("dp", "tp", "pp", "cp") if getattr(layout, name) > 1) or "1"
    words = [axes, f"micro {layout.micro}", f"shard={layout.shard}", one.run.precision, f"recompute={one.run.recompute}"]
    words += ["offload"] * layout.offload + list(one.other)
    state = "" if one.fits else _(" — does not fit")
    if one.fits and not found.meets(one):
        state = _(" — misses what is asked")
    yield f"{number}. " + " · ".join(words) + state
    yield _("   memory {peak} (weights {weights}, gradients {gradients}, optimizer {optimizer}, activations {kept}, working "
            "{working}{host})").format(
        peak=amounts.size(held.peak), weights=amounts.size(held.weights), gradients=amounts.size(held.gradients),
        optimizer=amounts.size(held.optimizer), kept=amounts.size(held.activations), working=amounts.size(held.working),
        host=_(", host {size}").format(size=amounts.size(held.host)) if held.host else "")
    tokens = one.run.step_rows * one.run.length / pace.step
    yield _("   step {step:.3g} s (computing {compute:.3g}, messages {messages:.3g}, bubble {bubble:.3g}, update {update:.3g}) = "
            "{tokens:,.0f} tokens/s{whole}").format(
        step=pace.step, compute=pace.compute, messages=pace.messages, bubble=pace.bubble, update=pace.update, tokens=tokens,
        whole=_whole(one))


def _whole(one: Candidate) -> str:
    if one.seconds is None:
        return ""
    text = _("; {steps:,} steps in {time}, {energy:,.1f} kWh").format(
        steps=one.steps, time=amounts.duration(one.seconds), energy=one.energy)
    return text if one.cost is None else text + _(", money {cost:,.2f}").format(cost=one.cost)


def _asked(found: Found) -> Iterator[str]:
    """Yield how far deadline and budget go."""
    best = found.best[0]
    hours = found.machine.device.price
    if found.deadline is not None and best.seconds is None:
        yield _("within {time} the first makes {steps:,} steps; how many the data ask for is not known here: give steps=N"
                ).format(time=amounts.duration(found.deadline), steps=int(found.deadline / best.pace.step))
    elif found.deadline is not None and best.seconds is not None and best.seconds > found.deadline:
        yield _("the deadline of {time} is missed: {steps:,} steps can be made until then, or take {count:,} such devices"
                ).format(time=amounts.duration(found.deadline), steps=int(found.deadline / best.pace.step),
            count=math.ceil(best.run.layout.world * best.seconds / found.deadline))
    if found.budget is not None and best.seconds is not None:
        used = best.run.layout.world * best.seconds / 3600
        if hours is None:
            yield _("the budget of {budget:,.2f} pays the {used:,.1f} device-hours at no more than {price:.3g} each; give --price"
                    ).format(budget=found.budget, used=used, price=found.budget / used)
        elif best.cost is not None and best.cost > found.budget:
            yield _("the budget of {budget:,.2f} is missed: {used:,.1f} device-hours cost {cost:,.2f}").format(
                budget=found.budget, used=used, cost=best.cost)


def verified(one: Candidate) -> tuple[Rehearsal, float]:
    """Rehearse a candidate in full; return the rehearsal, and by which share the estimate of its memory lies above it."""
    rehearsal = rehearse(one.run)
    return rehearsal, one.held.peak / rehearsal.largest.memory.peak - 1

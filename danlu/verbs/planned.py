"""The part of `danlu plan` that is asked about a recipe as it stands: what it will need on this machine, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from danlu import config
from danlu.errors import ResourceError
from danlu.log import count, duration
from danlu.planner.plan import Fix, Plan, fixes, plan, roomier, shape
from danlu.planner.probe import probe as probed
from danlu.train.intake import located, taken_in
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.verbs.rehearse import gigabytes
from danlu.verbs.searched import machine_of
from danlu.words import _


def recipe(file: Path | None, overrides: list[str], *, room: int | None, price: float | None, vocab: int | None, probe: bool,
           as_json: bool) -> int:
    """Print what the run needs in each phase, how long it takes, and the cheapest changes if it does not fit (exit code 5).

    room: bytes of each process; None: its share of this machine.  price: of a device-hour.
    """
    run = config.load(Run, needed(file), overrides)
    machine = machine_of(f"{run.layout.world}xhere", price)
    if room is not None:
        machine = machine.model_copy(update={"device": machine.device.model_copy(update={"memory": room})})
    run = located(run if vocab is not None else taken_in(run))
    of = shape(run, vocab)
    seconds = probed(run) if probe else None
    found = plan(of, machine, probe=seconds)
    helps = [] if found.fits else fixes(of, machine, found)
    if as_json:
        print(json.dumps(found.record() | {"fixes": [{"line": fix.line, "peak": fix.plan.phases[fix.plan.worst].resident,
                                                      "step": fix.plan.time.step} for fix in helps]}, ensure_ascii=False))
    else:
        show(found, helps)
    return 0 if found.fits else ResourceError.code


def show(found: Plan, helps: list[Fix]) -> None:
    """Print the tables and what follows from them."""
    console, record = Console(highlight=False), found.record()
    counts = {name: count(record[name]) for name in ("parameters", "tokens", "flops")}
    console.print(_("{parameters} parameters · {steps} steps · {tokens} tokens · {flops} FLOPs a step · {precision} on {world} × "
                    "{device}").format(**counts, steps=record["steps"], precision=record["precision"], world=record["world"],
                                       device=found.machine.device.name), soft_wrap=True)
    table = Table(title=_("one process, by phase"), title_justify="left", box=None, pad_edge=False)
    for name in (_("phase"), _("memory"), _("disk"), _("parts")):
        table.add_column(name)
    for name, each in found.phases.items():
        table.add_row(name, gigabytes(each.resident), gigabytes(each.disk) if each.disk else "–",
                      ", ".join(f"{part} {gigabytes(size)}" for part, size in each.parts.items()))
    console.print(table)
    timed, money = found.time, record["cost"]
    console.print(_("a step: {step:.3f} s (products {compute:.3f}, memory {memory:.3f}, messages {messages:.3f}, bubble "
                    "{bubble:.3f}, data {data:.3f}); the run: {whole}; {kwh:.3f} kWh").format(
        **timed.record() | {"whole": duration(timed.whole)}, kwh=money["kwh"])
        + ("" if money["money"] is None else _("; {money:.2f} in your currency").format(money=money["money"])), soft_wrap=True)
    if not found.machine.calibrated and not timed.probed and found.machine.device.name == "here":
        console.print(_("rates of this machine are assumed; danlu calibrate measures them, --probe makes a few real steps"))
    if found.fits:
        console.print(_("it fits: {phase} needs most, {need} of {room}").format(
            phase=found.worst, need=gigabytes(found.phases[found.worst].resident), room=gigabytes(found.room)))
        return
    if found.lacks_disk and found.disk_free is not None:
        console.print(_("the disk lacks room: {need} are needed at {place}, {free} are free; what helps: {fix}").format(
            need=gigabytes(found.phases["save"].disk), place=found.run.out, free=gigabytes(found.disk_free), fix=roomier()),
            markup=False, soft_wrap=True)
        return
    console.print(_("it does not fit: {phase} needs {need} of {room}").format(
        phase=found.worst, need=gigabytes(found.phases[found.worst].resident), room=gigabytes(found.room)))
    for fix in helps:
        console.print(_("it fits with {line}: {need}, {step:.3f} s a step").format(
            line=fix.line, need=gigabytes(fix.plan.phases[fix.plan.worst].resident), step=fix.plan.time.step), markup=False)

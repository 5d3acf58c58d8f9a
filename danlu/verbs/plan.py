"""`danlu plan recipe.yaml`: what the run will need, before it starts, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from danlu import config
from danlu.errors import ResourceError
from danlu.log import count, duration
from danlu.planner.hardware import here, parse
from danlu.planner.plan import Fix, Plan, fixes, plan, shape
from danlu.planner.probe import probe as probed
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.verbs.rehearse import amount, gigabytes
from danlu.words import _


def main(file: Path | None, overrides: list[str], *, hardware: str, memory: str | None, vocab: int | None, price: float | None,
         probe: bool, as_json: bool) -> int:
    """Print what the run needs in each phase, how long it takes, and the cheapest changes if it does not fit (exit code 5)."""
    path = needed(file)
    run = config.load(Run, path, overrides)
    machine = here(run.layout.world) if hardware == "here" else parse(hardware, price=price)
    if memory is not None:
        machine = machine.model_copy(update={"device": machine.device.model_copy(update={"memory": int(amount(memory))})})
    if hardware != "here" and run.device == "auto":
        run = run.model_copy(update={"device": "cpu" if machine.device.kind == "cpu" else "cuda"})
    if vocab is None and any(source.raw for sources in run.named.values() for source in sources):
        from danlu.train.intake import taken_in

        run = taken_in(run)
    of = shape(run, vocab)
    seconds = probed(path, overrides, threads=run.threads) if probe and run.layout.world == 1 else None
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
    console.print(_("{parameters} parameters · {steps} steps · {tokens} tokens · {flops} FLOPs a step · {precision} on {world} × "
                    "{device}").format(parameters=count(record["parameters"]), steps=record["steps"], tokens=count(record["tokens"]),
                                       flops=count(record["flops"]), precision=record["precision"], world=record["world"],
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
    console.print(_("it does not fit: {phase} needs {need} of {room}").format(
        phase=found.worst, need=gigabytes(found.phases[found.worst].resident), room=gigabytes(found.room)))
    for fix in helps:
        console.print(_("it fits with {line}: {need}, {step:.3f} s a step").format(
            line=fix.line, need=gigabytes(fix.plan.phases[fix.plan.worst].resident), step=fix.plan.time.step), markup=False)

"""What a recipe will need on a machine: memory by phase, FLOPs, time, energy, money; whether it fits; what helps if not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu import parallel
from danlu.errors import ConfigError, ResourceError
from danlu.parallel import World
from danlu.planner import blocks
from danlu.planner.clock import Time, Work, clock, cost
from danlu.planner.hardware import Machine
from danlu.planner.memory import Memory, memory, stored
from danlu.planner.rows import at_once, batches_of, repeated
from danlu.rehearse import Rehearsal, rehearse, settled
from danlu.rehearse.life import life
from danlu.rehearse.rows import columns
from danlu.train import setup
from danlu.train.recipe import Run
from danlu.words import _

ROOM = 0.95                                              # share of a device's memory that a run may fill


def roomier() -> str:
    """Return what helps where the disk lacks room."""
    return _("a smaller every.keep, every.best=false, or another `out`")


class Shape(NamedTuple):
    """A settled run, and the rows it would see."""

    run: Run
    batch: Mapping[str, Tensor]                          # of a step of one process
    held_out: Mapping[str, Tensor] | None
    steps: int
    held_rows: int
    data: float                                          # seconds that making a batch took


class Plan(NamedTuple):
    """What a run needs, and whether it fits."""

    run: Run
    machine: Machine
    rehearsal: Rehearsal
    phases: dict[str, Memory]
    time: Time
    flops: int                                           # of a step, of all processes
    tokens: int                                          # of the run
    room: int                                            # bytes a device may be filled with
    disk_free: int | None

    @property
    def worst(self) -> str:
        """The phase of the run that needs the most memory."""
        return max((name for name in self.phases if name not in ("merge", "export")), key=lambda name: self.phases[name].resident)

    @property
    def fits(self) -> bool:
        """Whether every phase fits, and the disk holds what is written."""
        return self.phases[self.worst].resident <= self.room and not self.lacks_disk

    @property
    def lacks_disk(self) -> bool:
        return self.disk_free is not None and self.phases["save"].disk > self.disk_free

    def record(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {"parameters": self.rehearsal.parameters, "precision": self.run.precision, "world": self.run.layout.world,
                "machine": {"device": self.machine.device.name, "count": self.machine.count, "room": self.room,
                            "calibrated": self.machine.calibrated},
                "phases": {name: each.record() for name, each in self.phases.items()}, "worst": self.worst, "fits": self.fits,
                "tensors": self.rehearsal.largest.memory.peak, "flops": self.flops, "tokens": self.tokens,
                "steps": self.time.steps, "time": self.time.record(), "cost": cost(self.time, self.machine)}


def shape(run: Run, vocab: int | None) -> Shape:
    """Return the run with what data and machine fill in.  vocab: ids of the tokenizer, where the data is not asked."""
    if vocab is not None:
        if vocab < 1:
            raise ConfigError(_("a vocabulary of {n} ids is none").format(n=vocab), where="--vocab")
        on_cpu = run.device == "auto" and not torch.cuda.is_available()
        known = settled(run.model_copy(update={"device": "cpu"}) if on_cpu else run, vocab)
        batch = repeated(columns(known), max(1, known.step_rows // known.layout.dp))
        return Shape(known, batch, repeated(batch, at_once(known)), known.steps or 1, 0, 0.0)
    data = setup.open_data(run)
    device = torch.device("cuda" if run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available()) else "cpu")
    known, _choice = setup.settle(run, data, World(run.layout, device), None)
    if known.network.kind == "foreign":
        raise ConfigError(_("{family} is a model of transformers, whose inside is not rehearsed").format(
            family=known.network.family), where=str(run.start), fix=_("let it train a few steps: steps=3"))
    known = known.model_copy(update={"device": device.type})
    batch, held, taken = batches_of(known, data)
    _rows, total = setup.training_rows(known, data)
    return Shape(known, batch, held, total, sum(shards.documents for shards in data.held_out), taken)


def plan(of: Shape, machine: Machine, *, probe: float | None = None) -> Plan:
    """Return what a run needs on a machine.  probe: seconds of a step, as measured."""
    run = of.run
    rehearsal = rehearse(run.model_copy(update={"start": None}))
    needs, flops, moved = dict[str, blocks.Need](), 0, 0
    if run.layout.pp == 1:
        size = max(1, run.step_rows // run.layout.dp)
        batch = repeated(of.batch, size)
        held_out = None if of.held_out is None else dict(of.held_out)
        lived = life(run, batch, held_out, copies=bool(run.every.save or run.every.best))
        needs, flops, moved = blocks.needs(lived.events), lived.flops, lived.moved
        needs["resume"] = blocks.needs(life(run, batch, None, resumes=True, copies=False).events)["resume"]
    else:
        flops = sum(sum(stage.usual.flops) for stage in rehearsal.largest.traced.stages) * run.layout.micro
    phases = memory(run, machine, rehearsal, needs)
    work = Work(flops, moved, of.data, of.steps, of.held_rows)
    timed = clock(run, rehearsal, machine, work, checkpoint=stored(run, rehearsal)["checkpoint"], probe=probe)
    free = shutil.disk_usage(existing(run.out)).free if machine.device.name == "here" else None
    return Plan(run, machine, rehearsal, phases, timed, flops * run.layout.world, of.steps * run.step_rows * run.length,
                int(machine.device.memory * ROOM), free)


def existing(path: Path) -> Path:
    """Return the nearest folder above `path` that is there."""
    path = path.resolve()
    return next(each for each in (path, *path.parents) if each.is_dir())


class Fix(NamedTuple):
    """A change of the recipe after which it fits, what it costs, and the line to paste."""

    changes: dict[str, Any]
    plan: Plan

    @property
    def line(self) -> str:
        """The change as words of the command line."""
        return " ".join(f"{name}={value}" for name, value in self.changes.items())


def fixes(of: Shape, machine: Machine, found: Plan, *, most: int = 3) -> list[Fix]:
    """Return the cheapest changes that let the run fit, each checked by planning it again; the fastest first."""
    made: list[Fix] = []
    for changes, change in candidates(of.run) if not found.lacks_disk else ():
        try:
            again = plan(changed(of, change), machine)
        except (ConfigError, ValueError):
            continue
        if again.fits:
            made.append(Fix(changes, again))
        if len(made) >= 2 * most:
            break
    return sorted(made, key=lambda fix: fix.plan.time.step)[:most]


Change = Callable[[Run], Run]


def changed(of: Shape, change: Change) -> Shape:
    """Return the run with a change, and its rows cut to the length that it has then."""
    run = change(of.run)

    def cut(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        length = columns["ids"].shape[1]
        return {name: column[:, :run.length].clone() if length > run.length and column.ndim > 1 and column.shape[1] == length
                else column for name, column in columns.items()}

    if run.length == of.run.length:
        return of._replace(run=run)
    held = None if of.held_out is None else repeated(cut(of.held_out), min(at_once(run), of.held_rows or at_once(run)))
    return of._replace(run=run, batch=cut(of.batch), held_out=held)


def candidates(run: Run) -> Iterator[tuple[dict[str, Any], Change]]:
    """Yield changes that save memory, those that cost least first."""
    each = run.step_rows // run.layout.dp
    now, of = run.layout.micro, run.micro_rows
    counts = [n for n in range(now + 1, each + 1) if each % n == 0 and (of is None or (n % now == 0 and of % (n // now) == 0))]
    micros: list[dict[str, Any]] = [{"layout.micro": n} | ({} if of is None else {"micro_rows": of * now // n}) for n in counts]
    wanted = [*micros[:2], *(micros[-1:] if len(micros) > 2 else [])]
    if run.device == "cpu" and run.allocator == "keep":
        wanted = [{"allocator": "return"}, *wanted, *(smaller | {"allocator": "return"} for smaller in micros[-1:])]
    if run.recompute != "full":
        wanted += [{"recompute": "full"}, *({"recompute": "full"} | smaller for smaller in micros[-1:])]
    if run.length > 128:
        wanted += [{"length": run.length // 2}]
    if run.optim.kind not in ("adafactor", "lion", "sgd") and run.adapt is None:
        wanted += [{"optim": "lion", "optim.lr": run.optim.lr}]
    for changes in wanted:
        yield changes, _applied(changes)


def _applied(changes: Mapping[str, Any]) -> Change:
    def change(run: Run) -> Run:
        for name, value in changes.items():
            if name == "layout.micro":
                run = run.model_copy(update={"layout": run.layout.model_copy(update={"micro": value})})
            elif name == "optim":
                from danlu.optim.lion import Lion

                run = run.model_copy(update={"optim": Lion(lr=run.optim.lr)})
            elif name != "optim.lr":                     # which it keeps
                run = run.model_copy(update={name: value})
        return run

    return change


def filled(run: Run, machine: Machine, *, given: set[str]) -> tuple[Run, Plan]:
    """Return the run with what its recipe leaves open filled in so that it fits, and its plan.

    given: names that the recipe says itself (precision, recompute, layout.micro, allocator).  ResourceError if nothing fits.
    """
    if "precision" not in given and run.precision == "auto":
        fast = parallel.fastest(torch.device("cpu")) if machine.device.kind == "cpu" else "bf16"
        run = run.model_copy(update={"precision": fast})
    of = shape(run, None)
    found = plan(of, machine)
    if found.fits:
        return run, found
    for changes, change in candidates(of.run) if not found.lacks_disk else ():
        if not set(changes) <= {"layout.micro", "micro_rows", "recompute", "allocator"} - given:
            continue
        again = plan(changed(of, change), machine)
        if again.fits:
            return change(run), again
    raise unfit(of, machine, found)


def unfit(of: Shape, machine: Machine, found: Plan) -> ResourceError:
    """Return the error of a run that does not fit, with the cheapest changes that help."""
    helps = fixes(of, machine, found)
    worst = found.phases[found.worst]
    if found.lacks_disk:
        return ResourceError(_("the disk lacks room: {need:.2f} GB are needed, {free:.2f} GB are free").format(
            need=found.phases["save"].disk / 1e9, free=(found.disk_free or 0) / 1e9), where=str(found.run.out), fix=roomier())
    return ResourceError(
        _("{phase} needs {need:.2f} GB of {room:.2f} GB that a device has room for").format(
            phase=found.worst, need=worst.resident / 1e9, room=found.room / 1e9),
        where=found.machine.device.name,
        fix="; ".join(fix.line for fix in helps) or _("a smaller model, or a machine with more memory"))

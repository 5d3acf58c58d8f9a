"""What each phase of a run needs: of the device, of the host, of the disk, by part.

Tensors are those of `rehearse`: the functions that train, on fake tensors.  The rest is what the process has beside them, and
what its allocator adds; each has its cause, and none is chosen for a single run.  The constants below were fitted to 150 real
runs of `bench.plan`, seeds 7, 11 and 12, on two machines; another seed gives other runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from danlu.adapt.lora import LoRA
from danlu.planner.blocks import Need, spread
from danlu.planner.hardware import Machine
from danlu.rehearse import Rehearsal
from danlu.train.recipe import Run

PHASES = ("load", "evaluate", "step", "save", "resume", "merge", "export")
JUDGING = 146_000_000                                    # scikit-learn and scipy, loaded before the first evaluation of a task
TALKING = 10_000_000                                     # a process group: gloo's threads and buffers, the mesh
PACKING = 62_000_000                                     # bitsandbytes
LIBRARIES = {"load": 12_000_000, "evaluate": 20_000_000, "step": 23_000_000, "save": 16_000_000,      # oneDNN's and MKL's packed
             "merge": 12_000_000, "export": 12_000_000}  # blocks and kernels
SENDING = 5_000_000                                      # what gloo copies of gradients, and the writers of a checkpoint's parts
SAFETY = 1.06                                            # of the whole: what differs from process to process


class Memory(NamedTuple):
    """Bytes of one process in a phase, by part; `disk` is what lies there at the end of the phase."""

    parts: dict[str, int]
    host: int = 0
    disk: int = 0

    @property
    def resident(self) -> int:
        """What the device must have room for."""
        return sum(self.parts.values())

    def record(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {"resident": self.resident, "parts": self.parts, "host": self.host, "disk": self.disk}


def memory(run: Run, machine: Machine, rehearsal: Rehearsal, needs: dict[str, Need]) -> dict[str, Memory]:
    """Return what the process that needs most needs in each phase.  needs: of `blocks.needs`, empty for a pipeline."""
    kept = stored(run, rehearsal)
    found: dict[str, Memory] = {}
    for phase in PHASES:
        need = needs.get(phase)
        if phase in ("merge", "export"):
            need = Need(0, 2 * kept["model"], kept["model"], 2 * kept["model"], 0)
        elif need is None:
            cut = run.layout.pp > 1
            if (phase == "resume" and (cut or not needs)) or (phase in ("step", "load", "save") and cut):
                need = _of_stage(rehearsal, phase)
            else:
                continue
        best = bool(run.every.best and run.every.evaluate)           # it stays, too
        written = kept["checkpoint"] * (run.every.keep + 1 + best)
        written += kept["model"] * (phase in ("merge", "export"))
        disk = {"step": 0, "load": 0, "evaluate": 0}.get(phase, written)
        found[phase] = Memory(_parts(run, machine, rehearsal, phase, need), rehearsal.largest.memory.host, disk)
    return found


def _of_stage(rehearsal: Rehearsal, phase: str) -> Need:
    own = rehearsal.largest.memory
    still = own.weights + own.optimizer
    most = own.peak if phase == "step" else still * (2 if phase == "save" else 1) + (own.weights if phase == "load" else 0)
    return Need(still, most, still if phase == "resume" else 0, most, 0)


def _parts(run: Run, machine: Machine, rehearsal: Rehearsal, phase: str, need: Need) -> dict[str, int]:
    cpu = machine.device.kind == "cpu"
    process = machine.base + LIBRARIES.get(phase, 0) * cpu + need.code
    if cpu and run.objective.tasks() and phase in ("load", "evaluate", "step", "save"):
        process += JUDGING
    if run.layout.world > 1:
        process += TALKING + (SENDING if phase in ("step", "save") else 0)
    if isinstance(run.adapt, LoRA) and run.adapt.base is not None:
        process += PACKING
    allocator = spread(need, phase, run.allocator) if cpu else need.rounded - need.tensors
    parts = {"process": process, "allocator": max(0, allocator), "files": need.mapped if cpu else 0}
    if phase == "step":
        own = rehearsal.largest.memory
        more = need.tensors - own.peak
        parts |= {"weights": own.weights, "gradients": own.gradients, "optimizer": own.optimizer, "activations": own.activations,
                  "rest": own.rest, "copies": max(0, more)}
    else:
        parts |= {"held": need.begin, "work": need.spread}
    parts["safety"] = int((SAFETY - 1) * sum(parts.values()))
    return {name: size for name, size in parts.items() if size}


def stored(run: Run, rehearsal: Rehearsal) -> dict[str, int]:
    """Return the bytes of the whole model's weights and of a checkpoint, all processes' parts together."""
    model = 4 * rehearsal.parameters
    optimizer = sum(part.memory.optimizer * run.layout.shards * run.layout.tp for part in rehearsal.parts)
    learning = sum(_size(p.shape) * 4 for part in rehearsal.parts for p in part.traced.parameters
                   if p.name in part.traced.trained) if run.adapt is not None else model
    return {"model": model, "checkpoint": learning * (2 if run.ema else 1) + optimizer}


def _size(shape: tuple[int, ...]) -> int:
    made = 1
    for side in shape:
        made *= side
    return made

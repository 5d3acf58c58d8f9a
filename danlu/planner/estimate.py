"""What a layout holds, sends and computes, by traces of two and of three blocks: no layout is traced in full size.

All but the number of blocks and of data-parallel processes is as in the run: the cutting of tensors, FSDP, the rows of a
micro-batch, recomputation.  Whatever a block adds is the difference between three and two (two, so that what is
gathered ahead is there); shapes say what shards hold.
`danlu rehearse` traces the whole; a test holds the two against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from danlu.layout import Layout
from danlu.models.build import Config, build
from danlu.parallel.pipeline import bounds, head_cost
from danlu.planner.hardware import Machine
from danlu.rehearse import slots
from danlu.rehearse.ledger import Traffic
from danlu.rehearse.trace import Pass, Spread, Traced, trace
from danlu.train.recipe import Run

ROUND = {"all-reduce": 2.0}                              # how often a ring moves all of it; once for the other kinds
START = {True: 10e-6, False: 30e-6}                      # seconds that a collective takes to begin, inside and outside a node
OVERLAP = 0.8                                            # share of the computing time behind which FSDP's messages hide
HOST_LINK = 25e9                                         # bytes/s between device and host: PCI Express 4.0 x16, in practice
FIRST = {"replicate": 0, "shard": 0, "tp": 0}            # the process that holds most
FEW = 2
PASSES = 1.5                                             # how often an optimizer's step reads or writes what it holds


class Held(NamedTuple):
    """Bytes of one process at its peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int                                     # kept for backward passes
    working: int                                         # all else, gradients that are not yet sharded among it
    host: int
    peak: int


class Pace(NamedTuple):
    """Seconds of a step."""

    compute: float
    messages: float                                      # that nothing hides
    bubble: float
    update: float

    @property
    def step(self) -> float:
        return self.compute + self.messages + self.bubble + self.update


class Basis(NamedTuple):
    """A stage of a process with FEW blocks, and with one more."""

    few: Traced
    more: Traced


class Traces:
    """Traces that estimates are made from; each is made once."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[Basis, ...]] = {}

    def of(self, run: Run) -> tuple[Basis, ...]:
        """Return the basis of the whole model, or of the first and the last stage."""
        name = key(run)
        if name not in self.made:
            few, more = _traced(reduced(run, FEW)), _traced(reduced(run, FEW + 1))
            self.made[name] = tuple(Basis(a, b) for a, b in zip(few, more, strict=True))
        return self.made[name]

    def knows(self, run: Run) -> bool:
        return key(run) in self.made

    @property
    def count(self) -> int:
        """Number of stages that were traced."""
        return sum(len(each) for each in self.made.values())


def key(run: Run) -> str:
    """Return what runs that share a basis have in common."""
    small = reduced(run, FEW)
    return repr((small.layout, small.rows, small.length, small.recompute, small.precision, small.optim, small.adapt, small.model,
                 small.objective, small.device))


def reduced(run: Run, blocks: int) -> Run:
    """Return a settled run with so many blocks a stage, in as few processes as show how it is cut."""
    layout = run.layout
    dp, pp = min(layout.dp, 8), min(layout.pp, 2)
    group = None if layout.group is None else min(layout.group, dp * layout.cp // 2)
    micro = min(layout.micro, 2)
    small = layout.model_copy(update={
        "dp": dp, "pp": pp, "micro": micro, "group": group, "stages": (blocks,) * pp if pp > 1 else None, "pipeline": "1f1b"})
    shape = run.network.model_copy(update={"layers": blocks * pp})
    return run.model_copy(update={"layout": small, "model": shape, "rows": run.part_rows * dp * micro, "micro_rows": None,
                                  "tokens": None})


def _traced(run: Run) -> list[Traced]:
    first = trace(run, 0)
    return [first] if run.layout.pp == 1 else [first, trace(run, run.layout.world // run.layout.pp, [first])]


def _line(few: float, more: float, blocks: int) -> int:
    return round(few + (blocks - FEW) * (more - few))


class Part(NamedTuple):
    """A stage of full size, as the line through its basis has it."""

    blocks: int
    basis: Basis
    run: Run

    def of(self, what: Callable[[Traced], float]) -> int:
        return _line(what(self.basis.few), what(self.basis.more), self.blocks)

    def static(self) -> tuple[int, int, int]:
        """Return the bytes of weights, gradients and optimizer of the first process."""
        few, more = (_static(self.run, each) for each in self.basis)
        weights, gradients, optimizer = (_line(a, b, self.blocks) for a, b in zip(few, more, strict=True))
        return weights, gradients, optimizer

    def peak(self, waiting: int) -> tuple[int, int]:
        """Return the peak beside weights and optimizer, and the activations then; waiting: micro-batches on their way."""
        a, b = (each.stages[0].passes[-1] for each in self.basis)
        kept, beyond = waiting * _line(a.kept, b.kept, self.blocks), max(0, self.blocks - FEW - 1)
        backward = (a if self.blocks <= FEW else b).backward + beyond * self.more(a, b)
        forward = (a.forward - a.kept) if self.blocks <= FEW else b.forward - b.kept
        if self.run.layout.shard == "none":
            forward += beyond * max(0, b.forward - b.kept - a.forward + a.kept)
        stage = self.basis.more.stages[0]
        messages = self.run.layout.micro * (stage.entered + stage.sent)
        peak = max(kept + max(forward, backward), self.of(lambda each: each.closing))
        return round(peak) + self.of(lambda each: each.base - each.weights) + messages, kept

    def more(self, a: Pass, b: Pass) -> float:
        """Return the bytes that every further block adds to what a backward pass needs for itself.

        Without shards: the difference, such as copies of its weights in bf16.  With them, what stays is the
        gradients' shards, if they are not there yet, less the activations let go.
        """
        if self.run.layout.shard == "none":
            return max(self.copies(), b.backward - a.backward)
        if self.run.layout.micro > 1:
            return 0.0
        one, two = (_static(self.run, each)[1] for each in self.basis)
        return max(0, two - one - (b.kept - a.kept))

    def copies(self) -> int:
        """Return the bytes of a block's trained matrices in 16 bits, which recomputing makes again and autocast keeps to the end.

        Of what is frozen autocast keeps no copy.
        """
        if self.run.recompute == "none" or self.run.precision == "fp32":
            return 0
        one, two = (sum(2 * math.prod(_resized(p, axis_sizes(self.run.layout)).at(FIRST)) for p in each.parameters
                        if len(p.shape) == 2 and p.name in each.trained) for each in self.basis)
        return max(0, two - one)

    def held(self, waiting: int) -> Held:
        weights, gradients, optimizer = self.static()
        peak, kept = self.peak(waiting)
        if self.run.layout.offload and self.run.device != "cpu":
            made = min(gradients, peak - kept)
            return Held(0, 0, 0, kept, peak - made - kept, weights + gradients + optimizer, peak - made)
        if peak < gradients:                             # so much the optimizer's step needs
            return Held(weights, gradients, optimizer, 0, 0, 0, weights + optimizer + gradients)
        made = min(gradients, peak - kept)
        return Held(weights, made, optimizer, kept, peak - kept - made, 0, weights + optimizer + peak)

    def flops(self) -> int:
        """Return the FLOPs of a step in one process."""
        return self.run.layout.micro * self.of(lambda each: sum(_pass(each, 1).flops))

    def traffic(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Return how many collectives of a step there are and their bytes, by axis and kind."""
        one, two = (_traffic(self.run, each) for each in self.basis)
        return {(kind.axis, kind.name): (_line(one.counts[kind], two.counts[kind], self.blocks),
                                         _line(one.bytes[kind], two.bytes[kind], self.blocks)) for kind in two.counts}


def _pass(one: Traced, number: int) -> Pass:
    passes = one.stages[0].passes
    return passes[min(number, len(passes) - 1)]


def _traffic(run: Run, one: Traced) -> Traffic:
    stage, micro, total = one.stages[0], run.layout.micro, Traffic().more(one.rest)
    last = stage.passes[-1].traffic                      # which exchanges gradients where there is no pipeline
    return total.more(stage.passes[0].traffic, micro - 1).more(last) if run.layout.pp == 1 else (
        total.more(stage.passes[0].traffic).more(last, micro - 1))


def _static(run: Run, one: Traced) -> tuple[int, int, int]:
    kept = slots(run.optim, {p.name: len(p.shape) for p in one.parameters if p.name in one.trained})
    weights = gradients = optimizer = 0
    sizes = axis_sizes(run.layout)
    for parameter in one.parameters:
        shape = _resized(parameter, sizes).at(FIRST)
        count = math.prod(shape)
        weights += int(count * parameter.size)
        if parameter.name in one.trained:
            gradients += int(count * parameter.size)
            optimizer += sum(math.prod(slot.at(shape)) * slot.size for slot in kept[parameter.name])
    return weights, gradients, optimizer


def axis_sizes(layout: Layout) -> dict[str, int]:
    """Return how many processes share work along each axis."""
    copies = layout.dp * layout.cp
    return {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp, "dp×cp": copies, "shard": layout.shards,
            "replicate": copies // layout.shards, "other": layout.world}


def _resized(parameter: Spread, sizes: Mapping[str, int]) -> Spread:
    return parameter._replace(sizes=tuple(sizes[axis] for axis in parameter.axes))


def parts(run: Run, traces: Traces) -> list[tuple[Part, int]]:
    """Return the stages that may hold most, each with the micro-batches that are on their way in it."""
    found = traces.of(run)
    if run.layout.pp == 1:
        return [(Part(run.network.layers, found[0], run), 1)]
    one = run.network.model_copy(update={"layers": 1})
    sizes = [len(blocks) for blocks in bounds(run.layout, run.network.layers, head=_head(one))]
    return [(Part(sizes[0], found[0], run), min(run.layout.pp, run.layout.micro)), (Part(sizes[-1], found[1], run), 1)]


@cache
def _head(one_block: Config) -> float:
    return head_cost(build(one_block))


def held(run: Run, traces: Traces) -> Held:
    """Return what the process that holds most has at its peak."""
    return max((part.held(waiting) for part, waiting in parts(run, traces)), key=lambda each: each.peak)


def rate_between(layout: Layout, machine: Machine, axis: str) -> tuple[float, bool]:
    """Return the bytes/s of a ring along an axis, and whether it stays inside a node.

    Ranks are counted with tp innermost, then cp, dp, pp; as many of a ring's processes as stand in one node send at once.
    """
    node = machine.device.node
    inside = {"tp": 1, "cp": layout.tp, "dp": layout.tp * layout.cp, "dp×cp": layout.tp, "pp": layout.tp * layout.cp * layout.dp}
    extent = axis_sizes(layout)
    reach = inside.get(axis, 1) * extent.get(axis, layout.world)
    if reach <= node:
        return machine.between(True), True
    together = 1 if axis == "pp" else max(1, node // inside.get(axis, 1))
    return min(machine.between(True), together * machine.between(False)), False


def messages(layout: Layout, machine: Machine, traffic: Mapping[tuple[str, str], tuple[float, float]]) -> dict[str, float]:
    """Return the seconds that the collectives of each axis take."""
    extent, total = axis_sizes(layout), dict.fromkeys(("tp", "cp", "dp", "pp"), 0.0)
    for (axis, kind), (count, size) in traffic.items():
        rate, near = rate_between(layout, machine, axis)
        ways = extent.get(axis, layout.world)
        moved = size if axis == "pp" else ROUND.get(kind, 1.0) * size * (ways - 1) / ways
        total["dp" if axis in ("dp×cp", "other") else axis] += moved / rate + count * START[near]
    return total


def pace(run: Run, machine: Machine, traces: Traces) -> Pace:
    """Return how long a step takes, in the slowest stage."""
    return max((_pace(part, machine) for part, _waiting in parts(run, traces)), key=lambda each: each.step)


def _pace(part: Part, machine: Machine) -> Pace:
    run, layout = part.run, part.run.layout
    compute = part.flops() / machine.rate(run.precision)
    weights, gradients, optimizer = part.static()
    return combined(layout, machine, compute, messages(layout, machine, part.traffic()),
                    weights + gradients + optimizer, device=run.device)


def combined(layout: Layout, machine: Machine, compute: float, talk: Mapping[str, float], state: float, *,
             device: str = "cuda") -> Pace:
    """Return the seconds of a step from its parts; state: bytes of weights, gradients and optimizer."""
    hidden = OVERLAP * compute if machine.device.kind != "cpu" and layout.shard != "none" else 0.5 * compute * (
        machine.device.kind != "cpu")
    exposed = talk["tp"] + talk["cp"] + talk["pp"] + max(0.1 * talk["dp"], talk["dp"] - hidden)
    bubble = (layout.pp - 1) / layout.micro * (compute + exposed) if layout.pp > 1 else 0.0
    update = PASSES * state / machine.device.bandwidth
    if layout.offload and device != "cpu":               # weights come, gradients go, and the host makes the step
        update = 2 * PASSES * state / HOST_LINK
    return Pace(compute, exposed, bubble, update)


def told(each: Held) -> dict[str, Any]:
    """Return JSON-ready values."""
    return dict(each._asdict())

"""The search: which layout, precision, recomputation, optimizer and method run fastest on a machine and fit into it.

Every candidate is first judged by shapes alone (`_Shape`: a line through a few traced blocks); the best are estimated by
traces of their own kind (`estimate`), and the caller rehearses what is left.  Nothing is random: the same question has the
same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from danlu import config
from danlu.adapt.lora import LoRA
from danlu.errors import ConfigError
from danlu.layout import Layout
from danlu.optim import Adafactor, Lion
from danlu.planner import estimate
from danlu.planner.estimate import Held, Pace, Traces
from danlu.planner.hardware import Machine
from danlu.rehearse import slots
from danlu.rehearse.trace import Spread, Traced
from danlu.train.recipe import Run
from danlu.words import _

KINDS = 3                                                # kinds of candidates that are traced; a pipeline counts double
SPACE = 60_000                                           # candidates that are looked at, the plainest first
SLACK = 0.85                                             # a bound of memory by shapes is that sure
PIPES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CUT = (1, 2, 4, 8, 16)                                   # tensor parallel
RINGS = (1, 2, 4, 8)                                     # context parallel
STRETCH = 4096                                           # fewest tokens that a part of a row is cut to


class Candidate(NamedTuple):
    """A way to run: what changes, and what it would hold and take."""

    run: Run
    changes: tuple[str, ...]                             # what to paste: a.b=c
    other: tuple[str, ...]                               # of them, what changes the result: optimizer, method
    held: Held
    pace: Pace
    steps: int | None
    machine: Machine

    @property
    def fits(self) -> bool:
        return self.held.peak + self.machine.base <= self.machine.device.memory and self.held.host * min(
            self.machine.device.node, self.run.layout.world) <= self.machine.host

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.pace.step

    @property
    def cost(self) -> float | None:
        price = self.machine.device.price
        return None if price is None or self.seconds is None else price * self.run.layout.world * self.seconds / 3600

    @property
    def energy(self) -> float | None:
        """kWh of the devices alone."""
        return None if self.seconds is None else self.machine.device.power * self.run.layout.world * self.seconds / 3.6e6


class Found(NamedTuple):
    """What the search has to say."""

    machine: Machine
    best: tuple[Candidate, ...]                          # the best first; those that fit before those that are merely least
    looked: int                                          # candidates that were compared
    traced: int                                          # kinds of them that were traced
    deadline: float | None
    budget: float | None

    def meets(self, one: Candidate) -> bool:
        """Return whether a candidate keeps to memory, deadline and budget, as far as those are known."""
        return one.fits and (self.deadline is None or one.seconds is None or one.seconds <= self.deadline) and (
            self.budget is None or one.cost is None or one.cost <= self.budget)


class _Shape(NamedTuple):
    """What a model is made of, by one row: bytes and FLOPs of a block, and of the ends."""

    layers: int
    weights: tuple[float, float]
    trained: tuple[float, float]
    state: float                                         # bytes of the optimizer for one of gradients
    kept: dict[str, tuple[float, float]]                 # by recomputation
    flops: dict[str, tuple[float, float]]
    stream: float                                        # bytes of a row between two blocks


def search(run: Run, machine: Machine, *, steps: int | None, deadline: float | None = None, budget: float | None = None,
           keep: int = 5, given: Run | None = None) -> Found:
    """Return the best ways to train a settled run on `machine`.  Raises ConfigError where there is none at all.

    steps: updates of the whole run, None if only the data can tell; given: the recipe as it was before it was settled, which
    may refuse a layout for other reasons; if it begins from weights, LoRA and QLoRA are compared, too.  What is learned
    changes only if nothing that keeps it the same meets all that is asked; such candidates name it.
    """
    traces, looked, best = Traces(), 0, list[Candidate]()
    methods = given is not None and given.start is not None and given.adapt is None
    for other, variant in _variants(run, methods=methods):
        ranked, count = _ranked(variant, machine, traces)
        looked += count
        cheap = sorted(ranked, key=lambda each: each[0] * each[1].layout.world)
        for order in (ranked, cheap) if budget is not None else (ranked,):      # the fastest need not be the cheapest
            made = _refined([run for _seconds, run in order], other, machine, traces=traces, steps=steps, keep=keep, given=given)
            best += [one for one in made if one.changes not in [each.changes for each in best]]
        found = Found(machine, tuple(best), looked, len(traces.made), deadline, budget)
        if any(found.meets(one) or (one.fits and variant.adapt == run.adapt and not methods) for one in best):
            break                                        # another optimizer makes nothing faster
    if not best:
        raise ConfigError(_("no layout of {rows} rows a step fits {count} × {name}").format(
            rows=run.step_rows, count=machine.count, name=machine.device.name), where="--hardware",
            fix=_("give a larger machine, or a shorter length"))
    def order_of(one: Candidate) -> tuple[bool, bool, int, float, tuple[str, ...]]:
        dear = budget is not None and one.cost is not None and one.cost > budget
        return not one.fits, not found.meets(one), len(one.other), (one.cost or 0.0) if dear else one.pace.step, one.changes

    best.sort(key=order_of)
    return found._replace(best=tuple(best[:keep]))


def _variants(run: Run, *, methods: bool) -> Iterator[tuple[tuple[str, ...], Run]]:
    """Yield the run as it is, then with another optimizer or method; each with the keys that say so."""
    yield (), run
    if methods:
        yield ("adapt=lora",), run.model_copy(update={"adapt": LoRA()})
        yield ("adapt=lora", "adapt.base=nf4"), run.model_copy(update={"adapt": LoRA(base="nf4")})
        return
    for kind in (Lion, Adafactor):
        if run.optim.kind not in ("lion", "adafactor", "sgd", "gd"):
            yield (f"optim={kind.model_fields['kind'].default}",), run.model_copy(update={"optim": kind()})


def precisions(run: Run, machine: Machine) -> list[str]:
    """Return the arithmetics that are worth comparing: one that is slower and takes no less memory is not."""
    if "precision" in run.model_fields_set and run.precision != "auto" and machine.device.flops.get(run.precision):
        return [run.precision]
    rates = {name: machine.device.flops.get(name, 0.0) for name in ("bf16", "fp16", "fp32")}
    half = next((name for name in ("bf16", "fp16") if rates[name] > 0), None)
    if half == "fp16" and machine.device.kind == "cpu":
        half = None
    return [half] if half and rates[half] >= rates["fp32"] else [name for name in ("fp32", half) if name and rates[name] > 0]


def layouts(run: Run, machine: Machine) -> Iterator[Layout]:
    """Yield the layouts that the rows, the model and the machine allow, those with the fewest cuts first."""
    rows, length, shape, node = run.step_rows, run.length, run.network.model_dump(), machine.device.node
    for pp in (n for n in PIPES if n <= min(machine.count, run.network.layers)):
        for tp in (n for n in CUT if n <= min(node, machine.count // pp)):
            for cp in (n for n in RINGS if n == 1 or (length // n >= STRETCH and n * tp * pp <= machine.count)):
                each, near = pp * tp * cp, min(node, machine.count)
                # as many copies as there is room for, as many as a node has room for, and one
                for dp in dict.fromkeys(_divisor(rows, max(1, most // each)) for most in (machine.count, near, 1)):
                    for one in _cuts(dp, tp, pp, cp, rows=rows, node=node):
                        try:
                            one.check(rows, length=length, model=shape, optimizer=run.optim.kind)
                        except ValueError:
                            continue
                        yield one


def _divisor(rows: int, most: int) -> int:
    """Return the largest number up to `most` that deals the rows out evenly."""
    return next(n for n in range(min(rows, most), 0, -1) if rows % n == 0)


def _cuts(dp: int, tp: int, pp: int, cp: int, *, rows: int, node: int) -> Iterator[Layout]:
    """Yield the layouts of such axes: by micro-batches, and by what the copies of a weight share."""
    for micro in (n for n in range(pp, rows // dp + 1) if (rows // dp) % n == 0):
        for shard in ("none", "full", "grads", "hybrid") if dp * cp > 1 else ("none",):
            group = node // tp if shard == "hybrid" else None
            if shard == "hybrid" and not (group and 1 < group < dp * cp and (dp * cp) % group == 0):
                continue
            yield Layout(dp=dp, tp=tp, pp=pp, cp=cp, micro=micro, shard=shard, group=group, sequence=tp > 1)


def _ranked(run: Run, machine: Machine, traces: Traces) -> tuple[list[tuple[float, Run]], int]:
    """Return the candidates that may fit, the fastest by shapes first, or the one that lacks least; and how many there were.

    A candidate comes with its seconds a step by shapes alone.
    """
    found: list[tuple[float, int, Run]] = []
    looked, least = 0, (math.inf, 0, run)
    room = machine.device.memory - machine.base
    for precision in precisions(run, machine):
        small = run.model_copy(update={"precision": precision})
        shape = _shape(small, traces)
        for layout in layouts(run, machine):
            if run.adapt is not None and run.adapt.check(layout, length=run.length, context=None, pack=run.packed):
                continue
            for recompute in ("none", "full"):
                looked += 1
                if looked > SPACE:
                    break
                bound = _bound(shape, layout, run.step_rows, recompute)
                if bound < least[0]:
                    least = bound, looked, _changed(small, layout, recompute)
                if bound * SLACK <= room:
                    seconds = _quick(shape, layout, small, machine, recompute=recompute)
                    found.append((seconds, looked, _changed(small, layout, recompute)))
                elif layout.shard != "none" and machine.device.kind != "cpu":
                    away = layout.model_copy(update={"offload": True})
                    if _bound(shape, away, run.step_rows, recompute) * SLACK <= room:
                        seconds = _quick(shape, away, small, machine, recompute=recompute)
                        found.append((seconds, looked, _changed(small, away, recompute)))
    ranked = [(seconds, one) for seconds, _number, one in sorted(found, key=lambda each: each[:2])]
    return ranked or [(math.inf, least[2])] * (least[0] < math.inf), looked


def _changed(run: Run, layout: Layout, recompute: str) -> Run:
    return run.model_copy(update={"layout": layout, "recompute": recompute, "rows": run.step_rows, "micro_rows": None,
                                  "tokens": None})


def _shape(run: Run, traces: Traces) -> _Shape:
    """Return what the model is made of, from one kind of traces, in one process.

    Recomputing keeps a block's input alone, in fp32 as the residual stream is, and makes its forward pass twice.
    """
    alone = run.model_copy(update={"layout": Layout(), "recompute": "none", "rows": 1, "micro_rows": None, "tokens": None})
    basis = traces.of(alone)[0]

    def split(of: Callable[[Traced], float]) -> tuple[float, float]:
        few, more = of(basis.few), of(basis.more)
        return float(more - few), float(few - estimate.FEW * (more - few))

    slot = slots(run.optim, {"blocks.0.mlp.up.weight": 2})["blocks.0.mlp.up.weight"]
    kept = split(lambda each: each.stages[0].passes[-1].kept)
    flops = split(lambda each: sum(each.stages[0].passes[-1].flops))
    forward = split(lambda each: each.stages[0].passes[-1].flops[0])[0]
    stream = 4.0 * run.length * run.network.width
    return _Shape(
        run.network.layers, split(lambda each: sum(_size(p) for p in each.parameters)),
        split(lambda each: sum(_size(p) for p in each.parameters if p.name in each.trained)),
        sum(each.size for each in slot if len(each.sides) == 2) / 4,
        {"none": kept, "full": (stream, kept[1])}, {"none": flops, "full": (flops[0] + forward, flops[1])},
        stream if run.precision == "fp32" else stream / 2)


def _size(parameter: Spread) -> int:
    return int(parameter.size * math.prod(parameter.shape))


def _bound(shape: _Shape, layout: Layout, rows: int, recompute: str) -> float:
    """Return about how many bytes a process holds at least."""
    blocks = -(-shape.layers // layout.pp)
    weights, trained = ((each[0] * blocks + each[1] / min(layout.pp, 2)) / layout.tp for each in (shape.weights, shape.trained))
    row = rows / (layout.dp * layout.micro * layout.cp * layout.tp)
    waiting = min(layout.pp, layout.micro)
    kept = row * (waiting * shape.kept[recompute][0] * blocks + max(0.0, shape.kept[recompute][1]) / min(layout.pp, 2))
    if layout.offload:
        return kept + (trained if layout.micro > 1 else 0)
    held = (weights + trained * (1 + shape.state)) / layout.shards
    whole = trained if layout.shard != "none" and layout.micro > 1 else 0.0
    return held + kept + whole + (weights / 2 if layout.shard == "grads" else 0.0)


def _quick(shape: _Shape, layout: Layout, run: Run, machine: Machine, *, recompute: str) -> float:
    """Return about how many seconds a step takes."""
    rows = run.step_rows / layout.dp / layout.micro
    flops = layout.micro * rows * (shape.layers * shape.flops[recompute][0] + shape.flops[recompute][1]) / (
        layout.tp * layout.cp * layout.pp)
    blocks, copies = -(-shape.layers // layout.pp), layout.dp * layout.cp
    weights, trained = ((each[0] * blocks + each[1] / min(layout.pp, 2)) / layout.tp for each in (shape.weights, shape.trained))
    traffic: dict[tuple[str, str], tuple[float, float]] = {}
    if layout.tp > 1:
        times = layout.micro * blocks * (6 if recompute == "full" else 4)
        traffic["tp", "all-reduce"] = times, times * rows * shape.stream / layout.cp
    if layout.cp > 1:
        times = layout.micro * blocks * (3 if recompute == "full" else 2)
        traffic["cp", "all-gather"] = times, 2 * times * rows * shape.stream
    half = 1 if run.precision == "fp32" else 2
    gathers = 1 if layout.shard == "grads" else 2 if layout.pp > 1 else 2 * layout.micro
    if copies > 1 and layout.shard == "none":
        traffic["dp×cp", "all-reduce"] = 1 + trained / 25e6, trained
    elif copies > 1:
        traffic["dp×cp", "all-gather"] = gathers * blocks, gathers * weights / half
        traffic["dp×cp", "reduce-scatter"] = blocks, trained
    if layout.pp > 1:
        traffic["pp", "send"] = 2 * layout.micro, 2 * layout.micro * rows * shape.stream / layout.cp
    state = (weights + trained * (1 + shape.state)) / layout.shards
    return estimate.combined(layout, machine, flops / machine.rate(run.precision), estimate.messages(layout, machine, traffic),
                             state, device=run.device).step


def _refined(ranked: list[Run], other: tuple[str, ...], machine: Machine, *, traces: Traces, steps: int | None,
             keep: int, given: Run | None) -> list[Candidate]:
    """Return the best that fit by traces of their own kind; where none does, the one that lacks least."""
    made, seen = list[Candidate](), set[tuple[int, float]]()
    begun = traces.count
    for run in ranked:
        most = KINDS if any(each.fits for each in made) else 3 * KINDS
        if not traces.knows(run) and traces.count - begun >= most:
            continue
        if given is not None and _refused(run, given):
            continue
        one = Candidate(run, _paste(run, other, given), other, estimate.held(run, traces), estimate.pace(run, machine, traces),
                        steps, machine)
        if (one.held.peak, one.pace.step) not in seen:   # of two that are the same, the plainer stands first
            made.append(one)
        seen.add((one.held.peak, one.pace.step))
        if sum(each.fits for each in made) >= 4 * keep:
            break
    made.sort(key=lambda one: (not one.fits, one.pace.step if one.fits else one.held.peak, one.changes))
    return [one for one in made if one.fits][:keep] or made[:1]


def _refused(run: Run, given: Run) -> bool:
    """Return whether the recipe refuses this layout for a reason beyond its shape, such as samples in a pipeline."""
    try:
        config.validate(Run, config.dump(given) | {
            "layout": config.dump(run.layout), "device": run.device, "precision": run.precision, "recompute": run.recompute,
            "rows": run.step_rows, "micro_rows": None, "tokens": None, "optim": config.dump(run.optim),
            "adapt": None if run.adapt is None else config.dump(run.adapt)})
    except ConfigError:
        return True
    return False


def _paste(run: Run, other: tuple[str, ...], given: Run | None) -> tuple[str, ...]:
    """Return the changes to the recipe that make it this run."""
    layout = run.layout.model_dump(exclude_defaults=True)
    then = run.layout if given is None else given.layout
    if given is not None and given.device not in ("auto", run.device):
        other += (f"device={run.device}",)
    other += tuple(f"{name}=null" for name in ("micro_rows", "tokens") if getattr(given, name, None) is not None)
    lines = [*other, f"rows={run.step_rows}", f"precision={run.precision}", f"recompute={run.recompute}"]
    for name in Layout.model_fields:
        value = getattr(run.layout, name)
        if name in layout or name in ("dp", "tp", "pp", "cp", "micro", "shard") or value != getattr(then, name):
            lines.append(f"layout.{name}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}")
    return tuple(lines)

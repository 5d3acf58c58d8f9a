"""A run rehearsed: what every process of a layout would hold, send and wait for, on one CPU and with nothing allocated.

One process of each pipeline stage is built and run on fake tensors (`trace`); it is the one that holds most, since uneven
shards give the first processes more.  What the others hold follows from the shapes of their parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from danlu import parallel
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.models.build import build
from danlu.optim import Optim
from danlu.rehearse.ledger import Kind, Traffic
from danlu.rehearse.order import Action, Cost, play
from danlu.rehearse.trace import Traced, trace
from danlu.train.recipe import Run
from danlu.words import _

PROBE = (5, 7)                                           # sides by which an optimizer's state tells what it is shaped like


class Memory(NamedTuple):
    """Bytes of one process at its peak."""

    weights: int
    gradients: int                                       # of what it holds; more, such as of gathered weights, is in `rest`
    optimizer: int
    activations: int                                     # kept for backward passes, of all micro-batches on their way
    rest: int                                            # gathered weights and gradients, logits, messages, working memory
    host: int = 0                                        # of weights, gradients and optimizer, in host memory

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.rest


class Part(NamedTuple):
    """The processes of one pipeline stage."""

    place: int                                           # along pp
    ranks: range
    traced: Traced
    memory: Memory
    traffic: Traffic
    busy: float                                          # share of the step in which they work
    holdings: tuple[Holding, ...]


class Holding(NamedTuple):
    """Processes that hold equally much."""

    parameters: int
    peak: int
    ranks: tuple[int, ...]


class Rehearsal(NamedTuple):
    """All processes of a run."""

    run: Run
    parameters: int                                      # of the whole model
    parts: tuple[Part, ...]
    bubble: float                                        # with equal stages, a backward pass taking as long as two forward passes
    bubble_by_work: float                                # … by the FLOPs of each stage

    @property
    def largest(self) -> Part:
        """The part whose first process needs the most memory."""
        return max(self.parts, key=lambda part: part.memory.peak)


def settled(run: Run, vocab: int | None) -> Run:
    """Return the run with what training would take from data and machine filled in.  ConfigError if it cannot be."""
    if run.start is not None:
        model = weights.read_config(run.start)
        if model.kind == "foreign":
            raise ConfigError(_("{family} is a model of transformers, whose inside is not rehearsed").format(family=model.family),
                              where=str(run.start), fix=_("let it train a few steps: steps=3"))
        tasks = run.objective.tasks()
        plain = [name for name in run.objective.heads if name not in {task.name for task in tasks}]
        model = model.with_tasks(tasks, outputs=plain) if tasks else model.with_heads(plain) if model.kind == "encoder" else model
    else:
        size = vocab if vocab is not None else run.network.vocab
        if size is None:
            raise ConfigError(_("the vocabulary is the tokenizer's, which is not asked here"), where="model.vocab",
                              fix=_("give --vocab N, or set model.vocab=N"))
        tasks = run.objective.tasks()
        model = run.network.model_copy(update={"vocab": size})
        model = (model.with_tasks(tasks, outputs=[n for n in run.objective.heads if n not in {t.name for t in tasks}])
                 if tasks else model).filled(vocab=size, heads=run.objective.heads)
    precision = run.precision
    if precision == "auto":
        precision = parallel.fastest(torch.device("cpu")) if run.device == "cpu" else "bf16"
    run = run.model_copy(update={"model": model, "start": None, "precision": precision})
    try:
        run.layout.check(run.step_rows, length=run.length, model=model.model_dump(), optimizer=run.optim.kind)
    except ValueError as error:
        raise ConfigError(str(error), where="layout") from None
    return run


def rehearse(run: Run) -> Rehearsal:
    """Return what the processes of a settled run would hold, send and wait for."""
    layout = run.layout
    each = layout.world // layout.pp
    traced: list[Traced] = []
    for index in range(layout.pp):
        traced.append(trace(run, index * each, traced))
    order, costs = traced[0].order, {}
    for one in traced:
        for stage in one.stages:
            forward, backward = stage.usual.flops
            costs[stage.number] = Cost(max(1, forward), max(1, backward))
    plain = play(order)
    by_work = play(order, costs)
    parts = []
    for index, one in enumerate(traced):
        memory = _memory(run, one, order[index])
        parts.append(Part(index, range(index * each, (index + 1) * each), one, memory, _traffic(run, one),
                          plain.busy[index] / plain.length, tuple(_holdings(run, one, memory, index * each))))
    whole = sum(parameter.numel() for parameter in build(run.network).parameters())
    return Rehearsal(run, whole, tuple(parts), plain.bubble, by_work.bubble)


def _memory(run: Run, one: Traced, order: Sequence[Action]) -> Memory:
    """Return the peak of a traced process: its order of work played through."""
    live = peak = at_peak = 0
    stages = {stage.number: stage for stage in one.stages}
    for action in order:
        stage = stages[action.stage]
        last = run.layout.pp == 1 and action.micro == run.layout.micro - 1
        now = stage.passes[-1] if last else stage.usual
        if action.kind == "F":
            live += now.kept
        working = now.forward - now.kept if action.kind == "F" else now.backward
        if live + working > peak:
            peak, at_peak = live + working, live
        if action.kind in "BW":
            live -= now.kept
    messages = sum(stage.entered + stage.sent for stage in one.stages) * run.layout.micro     # buffers for each micro-batch
    peak = max(peak, one.closing) + one.base - one.weights + messages
    own, gradients, optimizer = _static(one, _slots(run, one), {"replicate": 0, "shard": 0, "tp": 0})
    host = own + gradients + optimizer if run.layout.offload and run.device != "cpu" else 0
    made = min(gradients, peak - at_peak)                # before the first backward pass there are none
    rest = peak - at_peak - made + one.weights - own
    if host:
        return Memory(0, 0, 0, at_peak, rest, host)
    if made + at_peak + rest < gradients:                # so much the optimizer's step needs
        return Memory(own, gradients, optimizer, 0, 0)
    return Memory(own, made, optimizer, at_peak, rest)


def _slots(run: Run, one: Traced) -> dict[str, list[Slot]]:
    return slots(run.optim, {p.name: len(p.shape) for p in one.parameters if p.name in one.trained})


def _static(one: Traced, kept: dict[str, list[Slot]], place: dict[str, int]) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer of the process at `place`."""
    own = gradients = optimizer = 0
    for parameter in one.parameters:
        shape = parameter.at(place)
        size = int(_product(shape) * parameter.size)
        own += size
        if parameter.name in one.trained:
            gradients += size
            optimizer += sum(_product(slot.at(shape)) * slot.size for slot in kept[parameter.name])
    return own, gradients, optimizer


class Slot(NamedTuple):
    """A tensor that an optimizer keeps for a parameter."""

    sides: tuple[int, ...]                               # where PROBE's numbers stand, those of the parameter
    size: int                                            # bytes of an element

    def at(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return its shape for a parameter of `shape`."""
        known = dict(zip(PROBE[-len(shape):], shape, strict=True))
        return tuple(known.get(side, side) for side in self.sides) if _product(shape) else (0,)


def slots(optim: Optim, ranks: dict[str, int]) -> dict[str, list[Slot]]:
    """Return what an optimizer keeps for each parameter of so many dimensions: it makes one step on small ones."""
    return _tried(type(optim), optim.model_dump_json(), tuple(ranks.items()))


@lru_cache(64)
def _tried(kind: type[Optim], settings: str, ranks: tuple[tuple[str, int], ...]) -> dict[str, list[Slot]]:
    optim = kind.model_validate_json(settings)
    small = {name: nn.Parameter(torch.ones(PROBE[-rank:])) for name, rank in ranks}
    optimizer = optim.build(small.items())
    for parameter in small.values():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    return {name: [Slot(tuple(value.shape), value.element_size()) for value in optimizer.state[parameter].values()
                   if isinstance(value, torch.Tensor)] for name, parameter in small.items()}


def _product(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _holdings(run: Run, one: Traced, memory: Memory, first: int) -> Iterator[Holding]:
    """Yield what the processes of a stage hold, those that hold equally much together."""
    layout = run.layout
    copies = layout.dp * layout.cp // layout.shards
    kept = _slots(run, one)
    most = sum(_static(one, kept, {"replicate": 0, "shard": 0, "tp": 0}))
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for shard in range(layout.shards):
        for tp in range(layout.tp):
            place = {"replicate": 0, "shard": shard, "tp": tp}
            parameters = sum(_product(parameter.at(place)) for parameter in one.parameters)
            peak = memory.peak if memory.host else memory.peak - most + sum(_static(one, kept, place))
            found[parameters, peak] += [first + (copy * layout.shards + shard) * layout.tp + tp for copy in range(copies)]
    for (parameters, peak), ranks in found.items():
        yield Holding(parameters, peak, tuple(sorted(ranks)))


def _traffic(run: Run, one: Traced) -> Traffic:
    """Return what a process sends and receives in a step."""
    layout, total = run.layout, Traffic().more(one.rest)
    for stage, unshards in zip(one.stages, one.unshards, strict=True):
        first, usual, last = stage.passes[0], stage.usual, stage.passes[-1]
        if layout.pp > 1:
            total.more(first.traffic).more(usual.traffic, layout.micro - 1)
            for axis in ("dp", "cp", "dp×cp"):           # a schedule that gathers a stage's weights more than once
                total.more(first.traffic.of(axis, "all-gather"), max(0, unshards - 1))
        else:
            total.more(first.traffic)
            total.more(usual.traffic, max(0, layout.micro - 2)).more(last.traffic, int(layout.micro > 1))
        total.add(Kind("pp", "send"), stage.sent, layout.micro if stage.sent else 0)
        total.add(Kind("pp", "receive"), stage.sent, layout.micro if stage.sent else 0)
        total.add(Kind("pp", "send"), stage.entered, layout.micro if stage.entered else 0)
        total.add(Kind("pp", "receive"), stage.entered, layout.micro if stage.entered else 0)
    return total


def spans(ranks: Sequence[int]) -> str:
    """Return numbers as '0-7, 12'."""
    runs, made = [], []
    for _key, group in groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0]):
        runs.append([number for _place, number in group])
    for one in runs:
        made.append(str(one[0]) if len(one) == 1 else f"{one[0]}-{one[-1]}")
    return ", ".join(made)


def record(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return everything as JSON-ready values."""
    run = rehearsal.run
    return {
        "world": run.layout.world, "layout": run.layout.model_dump(mode="json"), "precision": run.precision,
        "parameters": rehearsal.parameters, "rows": run.step_rows, "length": run.length,
        "bubble": rehearsal.bubble, "bubble_by_work": rehearsal.bubble_by_work,
        "largest": {"rank": rehearsal.largest.ranks[0], "bytes": rehearsal.largest.memory.peak},
        "parts": [{
            "pp": part.place, "ranks": f"{part.ranks[0]}-{part.ranks[-1]}", "traced": part.traced.like,
            "stages": [{"number": s.number, "misfit": s.misfit, "blocks": s.blocks, "activations": s.usual.kept,
                        "flops": list(s.usual.flops)}
                       for s in part.traced.stages],
            "memory": part.memory._asdict() | {"peak": part.memory.peak}, "busy": part.busy,
            "traffic": part.traffic.record(),
            "parameters": {p.name: {"whole": list(p.shape), "here": list(p.at({"replicate": 0, "shard": 0, "tp": 0}))}
                           for p in part.traced.parameters},
            "holdings": [{"parameters": h.parameters, "peak": h.peak, "count": len(h.ranks), "ranks": spans(h.ranks)}
                         for h in part.holdings],
        } for part in rehearsal.parts],
    }

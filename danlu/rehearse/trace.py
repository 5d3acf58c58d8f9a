"""One process of a layout, built and run on fake tensors: what its stages hold and send in a micro-batch.

The model, the cutting, FSDP and the objective are the ones that train.  What cannot run without data or other processes
is stood in for, and no number depends on it:

- the rows: `head.learned` asks the data how many tokens count; here all do, or a masked objective's share of them, and
  rows hold several documents, so that attention has its mask;
- `head._ratio` compares gradients, and finds what it finds in any plain loss;
- the pipeline's schedule asks its neighbours for an answer before the first step: so stages are called one by one;
- DDP looks at the memory of its parameters: its buckets are those that its own function deals out;
- `offload` and CUDA's kernels are not there.  For an accelerator the head takes its larger chunks, and attention keeps no
  dropout mask, as the fused kernels do.  `compile` is left out; what it fuses needs less memory, never more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as local_shape
from torch.testing._internal.distributed.fake_pg import FakeStore

from danlu.layout import Layout
from danlu.nn import attention, head, paths
from danlu.objectives.lm import MaskedLM
from danlu.objectives.mixture import Mixture
from danlu.objectives.protocol import Objective
from danlu.parallel import DTYPES, World
from danlu.parallel.pipeline import bounds
from danlu.parallel.place import Placed, place
from danlu.parallel.world import meshed
from danlu.rehearse.ledger import Kind, Ledger, Traffic, changed, following
from danlu.rehearse.order import Action, alone, orders
from danlu.train.recipe import Run
from danlu.train.step import Engine

CPU = torch.device("cpu")
BUCKETS = [2**20, 25 * 2**20]                            # bytes of DDP's first bucket, and of the others


class Spread(NamedTuple):
    """A parameter and how it is cut."""

    name: str
    shape: tuple[int, ...]
    size: int                                            # bytes of an element
    axes: tuple[str, ...]                                # of the mesh that it is cut over
    sizes: tuple[int, ...]
    placements: tuple[Any, ...]

    def at(self, place: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of the part that the process at `place` holds."""
        if not self.axes:
            return self.shape
        return local_shape(self.shape, self.sizes, [place[axis] for axis in self.axes], self.placements)[0]


class Pass(NamedTuple):
    """A micro-batch in one stage: bytes that stay after its forward pass, and that each pass needs for itself."""

    kept: int
    forward: int
    backward: int
    flops: tuple[int, int]
    traffic: Traffic


@dataclass
class Stage:
    """What a stage does in a step: the first, a middle and the last micro-batch."""

    number: int
    blocks: int
    passes: list[Pass] = field(default_factory=list)
    sent: int = 0                                        # bytes of what it puts out, 0 in the last
    entered: int = 0                                     # … and takes in from another, 0 in the first

    @property
    def usual(self) -> Pass:
        return self.passes[min(1, len(self.passes) - 1)]


@dataclass
class Traced:
    """A process: its part of the model and what its step needs."""

    rank: int
    parameters: list[Spread]
    trained: set[str]
    tied: tuple[str, ...]
    order: list[list[Action]]                            # of all processes of the pipeline
    unshards: dict[int, int]                             # how often the pipeline gathers each stage
    stages: list[Stage]
    weights: int                                         # bytes, as allocated
    base: int                                            # bytes between two micro-batches
    closing: int                                         # bytes that the exchange at the end needs for itself
    ddp: bool
    rest: Traffic                                        # once a step


@contextmanager
def process(layout: Layout, rank: int) -> Iterator[World]:
    """Be process `rank` of the layout, among others that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        yield meshed(layout, CPU)
    finally:
        dist.destroy_process_group()


def placed_as(run: Run, world: World) -> Placed:
    """Return this process's part of the model, on the meta device."""
    return place(run.network, world, run.objective, precision=run.precision, recompute=run.recompute, length=run.length,
                 rows=run.part_rows, device="meta")


def spread(placed: Placed) -> list[Spread]:
    """Return the parameters of a placed model."""
    made = []
    for name, parameter in placed.named_parameters():
        size, cut = parameter.element_size(), isinstance(parameter, DTensor)
        mesh: Any = parameter.device_mesh if cut else None
        made.append(Spread(name, tuple(parameter.shape), size, tuple(mesh.mesh_dim_names) if cut else (),
                           tuple(mesh.shape) if cut else (), tuple(parameter.placements) if cut else ()))     # type: ignore[attr-defined]
    return made


def groups(world: World) -> tuple[dict[str, str], dict[str, int]]:
    """Return the axis and the size of each process group, by its name."""
    layout, axes, sizes = world.layout, {}, {}
    copies = "dp×cp" if layout.dp > 1 and layout.cp > 1 else "cp" if layout.cp > 1 else "dp"
    for mesh in (world.data, world.mesh):
        for axis in (mesh.mesh_dim_names or ()) if mesh is not None else ():
            group = mesh.get_group(axis)                                    # type: ignore[union-attr]
            axes[group.group_name] = copies if axis in ("replicate", "shard") else axis
            sizes[group.group_name] = group.size()
    if world.ends is not None:
        axes[world.ends.group_name], sizes[world.ends.group_name] = "pp", 2
    return axes, sizes


def columns(run: Run) -> dict[str, Tensor]:
    """Return one micro-batch of one process, as the objective's `collate` shapes it; only shapes matter."""
    rows, shape = run.part_rows, (run.part_rows, run.length)
    whole = {name: torch.zeros(shape, dtype=torch.int64) for name in ("ids", "labels", "positions", "types")}
    batch = whole | {"weights": torch.ones(shape), "segments": torch.ones(shape, dtype=torch.int32)}
    for term in run.objective.terms:
        if term in ("nsp", "sop"):
            batch |= {term: torch.zeros(rows, dtype=torch.int64), f"{term}_weights": torch.ones(rows)}
    asked = {*run.objective.inputs, "weights"}
    return {name: column for name, column in batch.items() if name in asked or name.startswith(("nsp", "sop"))}


def share(objective: Objective) -> float:
    """Return the share of tokens that are learned from."""
    parts = [part.objective for part in objective.parts] if isinstance(objective, Mixture) else [objective]
    return next((part.rate for part in parts if isinstance(part, MaskedLM)), 1.0)


@contextmanager
def stand_ins(run: Run) -> Iterator[None]:
    """Let nothing ask for data that is not there; see the module's first lines."""
    learned_share, accelerator = share(run.objective), run.device != "cpu"

    def learned(weights: Tensor, *, everything: bool = False) -> Tensor:
        return torch.arange(math.ceil(weights.numel() * learned_share))

    with ExitStack() as stack:
        stack.enter_context(changed(head, "learned", learned))
        stack.enter_context(changed(head, "_ratio", lambda up, hint: 1.0))
        if accelerator:
            stack.enter_context(changed(head, "CHUNK_BYTES", {}))
            stack.enter_context(changed(head, "SLAB_BYTES", 2**62))
        yield


def trace(run: Run, rank: int) -> Traced:
    """Return what process `rank` of the run's layout holds and does in a step."""
    layout, cfg = run.layout, run.network
    with process(layout, rank) as world:
        placed = placed_as(run, world)
        parameters = spread(placed)
        accelerator = run.device != "cpu"
        choice = paths.rule("cuda" if accelerator else "cpu", DTYPES[run.precision], run.length, causal=cfg.kind == "decoder")
        for module in (m for part in placed.parts for m in part.modules()):
            if accelerator and isinstance(module, attention.Attention):
                module.dropout = 0.0
        ledger = Ledger(*groups(world))
        with stand_ins(run), FakeTensorMode(allow_non_fake_inputs=True), following(ledger):
            for root in placed.roots:
                root.to_empty(device="cpu")
            engine = Engine(placed.use(choice).train(), run.objective, precision=run.precision, clip=run.clip, seed=run.seed)
            ddp = layout.dp * layout.cp > 1 and not placed.sharded and layout.local is None
            weights = ledger.mark()
            if ddp:                                      # whose buckets are there from the start
                for leaf in engine.leaves:
                    leaf.param.grad = torch.zeros_like(leaf.param)
            stages, base = _stages(run, placed, engine, ledger)
            ledger.take()
            closing = _close(placed, ledger)
            _finish(run, engine, ledger)
            rest, _flops = ledger.take()
        if ddp:
            _buckets(engine, rest)
        pipe = placed.pipe
        made = Traced(rank, parameters, {leaf.name for leaf in engine.leaves}, placed.tied,
                      orders(pipe.schedule) if pipe is not None else alone(layout.micro),
                      _unshards(pipe.schedule, world.index("pp")) if pipe is not None else {},
                      stages, weights, base, closing, ddp, rest)
    return made


def _stages(run: Run, placed: Placed, engine: Engine, ledger: Ledger) -> tuple[list[Stage], int]:
    """Run a few micro-batches through the stages; return what each does, and the bytes that are alive between two."""
    layout, pipe = run.layout, placed.pipe
    batch = engine.to_device(columns(run))
    if pipe is None:
        only = Stage(0, run.network.layers)
        base = ledger.mark()
        for number in range(min(layout.micro, 3)):
            last = number == min(layout.micro, 3) - 1
            only.passes.append(_whole(engine, batch, ledger, last))
            base = ledger.mark() if number == 0 and not last else base
        return [only], base
    ranges = bounds(layout, run.network.layers)
    stages, base = [], 0
    for root, at in zip(placed.roots, _numbers(placed), strict=True):
        stages.append(Stage(at, len(ranges[at])))
        stages[-1].passes.append(_part(stages[-1], root, batch, ledger, run))
        base = ledger.mark()
    for stage, root in zip(stages, placed.roots, strict=True):
        stage.passes.append(_part(stage, root, batch, ledger, run))
    return stages, base


def _numbers(placed: Placed) -> list[int]:
    schedule: Any = placed.pipe.schedule if placed.pipe is not None else None
    return [stage.stage_index for stage in _of(schedule)]


def _of(schedule: Any) -> list[Any]:
    """Return the stages of PyTorch's schedule."""
    return list(schedule._stages) if hasattr(schedule, "_stages") else [schedule._stage]


def _unshards(schedule: Any, rank: int) -> dict[int, int]:
    """Return how often the schedule gathers each stage's weights; 1F1B leaves that to FSDP, which does it once."""
    table = getattr(schedule, "pipeline_order_with_comms", None)
    counts: dict[int, int] = {}
    for action in table[rank] if table else ():
        if action.computation_type.name == "UNSHARD":
            counts[action.stage_index] = counts.get(action.stage_index, 0) + 1
    return counts


def _whole(engine: Engine, batch: dict[str, Tensor], ledger: Ledger, last: bool) -> Pass:
    """Return what a micro-batch does in a process that has all blocks."""
    before = ledger.mark()
    ledger.take()
    with engine.placed.exchanging(last):
        loss = engine.sums(batch).sum()
        made = ledger.peak - before, ledger.flops
        after = ledger.mark()
        loss.backward()
    backward = ledger.peak - after
    traffic, flops = ledger.take()
    return Pass(after - before, made[0], backward, (made[1], flops - made[1]), traffic)


def _part(stage: Stage, root: nn.Module, batch: dict[str, Tensor], ledger: Ledger, run: Run) -> Pass:
    """Return what a micro-batch does in a stage of a pipeline, without the exchange of gradients."""
    first, last = stage.number == 0, bool(root.part.last)                   # type: ignore[union-attr]
    x = batch["ids"] if first else _between(run).requires_grad_()
    upstream = None if last else _between(run)
    before = ledger.mark()
    ledger.take()
    out = root(x, **{name: column for name, column in batch.items() if name != "ids"})
    made = ledger.peak - before, ledger.flops
    after = ledger.mark()
    if isinstance(root, FSDPModule):                     # as the schedule does it
        root.set_is_last_backward(False)
        root.set_reshard_after_backward(False)
        root.set_requires_gradient_sync(False)
    (out.sum() if upstream is None else out).backward(None if upstream is None else upstream.to(out.dtype))
    backward = ledger.peak - after
    traffic, flops = ledger.take()
    stage.entered = 0 if first else x.numel() * x.element_size()
    stage.sent = 0 if upstream is None else out.numel() * out.element_size()
    return Pass(after - before, made[0], backward, (made[1], flops - made[1]), traffic)


def _between(run: Run) -> Tensor:
    """Return what one stage sends another."""
    layout = run.layout
    tokens = run.length // layout.cp // (layout.tp if layout.sequence else 1)
    kind = DTYPES[run.precision] if run.precision == "fp64" else torch.float32
    return torch.empty(run.part_rows, tokens, run.network.width, dtype=kind)


def _close(placed: Placed, ledger: Ledger) -> int:
    """Exchange the gradients of a pipeline's stages, as its schedule does at the end; return the bytes that needs."""
    before = ledger.mark()
    if placed.pipe is not None:
        for stage in _of(placed.pipe.schedule):
            stage.perform_reduce_grad(1)
    return ledger.peak - before


def _finish(run: Run, engine: Engine, ledger: Ledger) -> None:
    """Do what stands around the micro-batches of a step: counts, sums, gradients that several hold, the norm."""
    terms = len(run.objective.terms)
    for talk in (lambda: engine._agree(torch.zeros(terms, dtype=torch.float64)), lambda: engine.total(torch.zeros(terms)),
                 engine.gather, engine.norm):
        with suppress(DataDependentOutputException):     # each ends in a number, once everything is sent
            talk()


def _buckets(engine: Engine, traffic: Traffic) -> None:
    """Add DDP's exchange of gradients, in the buckets that its own function makes."""
    layout = engine.layout
    axis = "dp×cp" if layout.dp > 1 and layout.cp > 1 else "cp" if layout.cp > 1 else "dp"
    shapes = [torch.empty(leaf.param.shape, dtype=leaf.param.dtype, device="meta") for leaf in reversed(engine.leaves)]
    dealt, _limits = dist._compute_bucket_assignment_by_size(shapes, BUCKETS, [False] * len(shapes))
    for bucket in dealt:
        traffic.add(Kind(axis, "all-reduce"), sum(shapes[i].numel() * shapes[i].element_size() for i in bucket))

"""One process of a layout, built and run on fake tensors: what its stages hold and send in a micro-batch.

The model, the cutting, FSDP and the objective are the ones that train.  What cannot run without data or other processes
is stood in for, and no number depends on it:

- the rows: `head.learned` asks the data how many tokens count; here all do, or a masked objective's share of them, and
  rows hold several documents, so that attention has its mask;
- `head._ratio` compares gradients, and finds what it finds in any plain loss;
- the pipeline's schedule asks its neighbours for an answer before the first step: so stages are called one by one;
- DDP looks at the memory of its parameters: its buckets are those that its own function deals out;
- `offload` and CUDA's kernels are not there.  For an accelerator the head takes its larger chunks, and attention keeps no
  dropout mask, as the fused kernels do.  `compile` is left out, and so is what libraries and allocators take.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as local_shape
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from danlu.adapt import quantize
from danlu.adapt.lora import LoRA
from danlu.layout import Layout
from danlu.nn import attention, head, paths, placed
from danlu.nn.collective import numbered
from danlu.parallel import DTYPES, World
from danlu.parallel.pipeline import ranges_of
from danlu.parallel.place import Placed, place
from danlu.parallel.world import meshed
from danlu.rehearse.ledger import Kind, Ledger, Traffic, changed, following
from danlu.rehearse.order import Action, alone, orders
from danlu.rehearse.packed import BLOCK, NESTED, packable, packed, unpacked
from danlu.rehearse.rows import columns, share
from danlu.train import adapted
from danlu.train.recipe import Run
from danlu.train.step import Engine

CPU = torch.device("cpu")
BUCKETS = [2**20, 25 * 2**20]                            # bytes of DDP's first bucket, and of the others


class Spread(NamedTuple):
    """A parameter and how it is cut."""

    name: str
    shape: tuple[int, ...]
    size: float                                          # bytes of an element; of a packed one, a part of one
    axes: tuple[str, ...]                                # of the mesh that it is cut over
    sizes: tuple[int, ...]
    placements: tuple[Any, ...]

    def at(self, place: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of the part that the process at `place` holds."""
        if not self.axes:
            return self.shape
        return _local(self.shape, self.sizes, tuple(place[axis] for axis in self.axes), self.placements)


@cache
def _local(shape: tuple[int, ...], sizes: tuple[int, ...], place: tuple[int, ...],
           placements: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(local_shape(shape, sizes, list(place), placements)[0])


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
    misfit: str = ""                                     # what it puts out, if the next stage expects something else

    @property
    def usual(self) -> Pass:
        return self.passes[min(1, len(self.passes) - 1)]


@dataclass
class Traced:
    """A process: its part of the model and what its step needs."""

    rank: int
    like: int                                            # the process that was run for it, itself or its twin
    looks: tuple[Any, ...]                               # what makes twins
    parameters: list[Spread]
    trained: set[str]
    tied: tuple[str, ...]
    order: list[list[Action]]                            # of all processes of the pipeline
    unshards: tuple[int, ...]                            # how often the pipeline gathers each of its stages; 0: leaves it to FSDP
    stages: list[Stage]
    weights: int                                         # bytes, as allocated
    base: int                                            # bytes between two micro-batches
    closing: int                                         # bytes that the exchange at the end needs for itself
    ddp: bool
    rest: Traffic                                        # once a step


@contextmanager
def process(layout: Layout, rank: int) -> Iterator[World]:
    """Be process `rank` of the layout, among others that are not there."""
    told = sys.excepthook                                # which a process group prefixes with its rank
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    _clear_sharding_prop_cache()                         # its meshes look alike for every process, and name other groups
    try:
        yield meshed(layout, CPU)
    finally:
        dist.destroy_process_group()
        sys.excepthook = told


def placed_as(run: Run, world: World) -> Placed:
    """Return this process's part of the model, on the meta device."""
    return place(run.network, world, run.objective, precision=run.precision, recompute=run.recompute, length=run.length,
                 adapt=run.adapt, rows=run.part_rows, device="meta", table=adapted.table_of(run))


def materialise(run: Run, model: Placed) -> None:
    """Give a process's part of the model memory, inside a fake mode; pack its base where the recipe says so."""
    if isinstance(run.adapt, LoRA) and run.adapt.base is not None:
        for part in model.parts:
            for module in packable(part):
                weight = torch.empty(module.weight.shape)
                for _temporary in range(3 if run.adapt.base == "nf4" else 1):
                    weight = weight.abs()
                module.register_parameter("weight", None)
                if type(module) is torch.nn.Linear:
                    module.__class__ = quantize.PackedLinear
                module.__dict__["packed"] = packed(weight, run.adapt.base)
    for root in model.roots:
        root.to_empty(device="cpu")


def spread(model: Placed, base: quantize.Bits | None = None) -> list[Spread]:
    """Return the parameters of a placed model, which is not packed yet.  base: how its base will be packed."""
    made = []
    few = {id(module.weight) for part in model.parts for module in packable(part)} if base is not None else set()
    width = {"nf4": 0.5 + (1 + 4 / NESTED) / BLOCK, "int8": 1.0, None: 0.0}[base]
    for name, parameter in model.named_parameters():
        tensor: Tensor = parameter
        axes: tuple[str, ...] = ()
        sizes: tuple[int, ...] = ()
        placements: tuple[Any, ...] = ()
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            axes, sizes, placements = tuple(mesh.mesh_dim_names or ()), tuple(mesh.shape), tuple(tensor.placements)
        size = width if id(parameter) in few else tensor.element_size()
        made.append(Spread(name, tuple(tensor.shape), size, axes, sizes, placements))
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


@contextmanager
def stand_ins(run: Run) -> Iterator[None]:
    """Let nothing ask for data that is not there; see the module's first lines."""
    learned_share, accelerator, extent = share(run.objective), run.device != "cpu", placed.extent

    def learned(weights: Tensor, *, everything: bool = False) -> Tensor:
        return torch.arange(math.ceil(weights.numel() * learned_share))

    def reckoned(tensor: Tensor) -> placed.Extent:
        with unset_fake_temporarily():                   # it asks tensors of its own for numbers
            return extent(tensor)

    with ExitStack() as stack:
        stack.enter_context(changed(placed, "extent", reckoned))
        stack.enter_context(changed(head, "learned", learned))
        stack.enter_context(changed(head, "_ratio", lambda up, hint: 1.0))
        stack.enter_context(changed(quantize.Packed, "dense", unpacked))
        if accelerator:
            stack.enter_context(changed(head, "CHUNK_BYTES", {}))
            stack.enter_context(changed(head, "SLAB_BYTES", 2**62))
        yield


def trace(run: Run, rank: int, known: Sequence[Traced] = ()) -> Traced:
    """Return what process `rank` of the run's layout holds and does in a step.

    known: other processes; if one's stages are just like those of this one, so is what they do.
    """
    layout, cfg = run.layout, run.network
    with process(layout, rank) as world:
        model = placed_as(run, world)
        parameters = spread(model, run.adapt.base if isinstance(run.adapt, LoRA) else None)
        looks = _looks(run, model, parameters)
        twin = next((one for one in known if one.looks == looks), None)
        if twin is not None:
            numbers = [work.stage_index for work in _of(model.pipe.schedule)] if model.pipe is not None else [0]
            names = dict(zip((p.name for p in twin.parameters), (p.name for p in parameters), strict=True))
            stages = [replace(stage, number=number) for stage, number in zip(twin.stages, numbers, strict=True)]
            return replace(twin, rank=rank, stages=stages, parameters=parameters, like=twin.rank,
                           trained={names[name] for name in twin.trained})
        accelerator = run.device != "cpu"
        choice = paths.rule("cuda" if accelerator else "cpu", DTYPES[run.precision], run.length, causal=cfg.causal)
        for module in (m for part in model.parts for m in part.modules()):
            if accelerator and isinstance(module, attention.Attention):
                module.dropout = 0.0
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        ledger = Ledger(fake, *groups(world))
        with stand_ins(run), fake, following(ledger):
            materialise(run, model)
            engine = Engine(model.use(choice).train(), run.objective, precision=run.precision, clip=run.clip, seed=run.seed)
            ddp = layout.dp * layout.cp > 1 and not model.sharded and layout.local is None
            weights = ledger.mark()
            if ddp:                                      # whose buckets are there from the start
                for leaf in engine.leaves:
                    leaf.param.grad = torch.zeros_like(leaf.param)
            stages, base = _stages(run, model, engine, ledger)
            ledger.take()
            closing = _close(model, ledger)
            _finish(run, engine, ledger)
            rest, _flops = ledger.take()
        if ddp:
            _buckets(engine, rest)
        pipe = model.pipe
        made = Traced(rank, rank, looks, parameters, {leaf.name for leaf in engine.leaves}, model.tied,
                      orders(pipe.schedule) if pipe is not None else alone(layout.micro),
                      _unshards(pipe.schedule, world.index("pp")) if pipe is not None else (0,),
                      stages, weights, base, closing, ddp, rest)
    return made


def _looks(run: Run, model: Placed, parameters: Sequence[Spread]) -> tuple[Any, ...]:
    """Return all on which it depends what a process does in a step, its rank apart."""
    every = run.recompute if isinstance(run.recompute, int) else 1
    full = getattr(run.network, "full_layers", 0)
    blocks = tuple((number % every == 0, number < full) for part in model.parts for number, _block in numbered(part.blocks))
    works = _of(model.pipe.schedule) if model.pipe is not None else []
    ends = tuple((work.is_first, work.is_last) for work in works)
    counts = _unshards(model.pipe.schedule, model.world.index("pp")) if model.pipe is not None else ()
    return (ends, blocks, tuple((p.shape, p.axes, str(p.placements)) for p in parameters),
            counts, model.world.ends is not None)


def _stages(run: Run, model: Placed, engine: Engine, ledger: Ledger) -> tuple[list[Stage], int]:
    """Run a few micro-batches through the stages; return what each does, and the bytes that are alive between two."""
    layout, pipe = run.layout, model.pipe
    batch = engine.to_device(columns(run))
    if pipe is None:
        only = Stage(0, run.network.layers)
        base = ledger.mark()
        for number in range(min(layout.micro, 3)):
            last = number == min(layout.micro, 3) - 1
            only.passes.append(_whole(engine, batch, ledger, last))
            base = ledger.mark() if number == 0 and not last else base
        return [only], base
    ranges = ranges_of(layout, run.network)
    works = _of(pipe.schedule)
    stages, base = [Stage(work.stage_index, len(ranges[work.stage_index])) for work in works], 0
    for number in range(2):
        for stage, work in zip(stages, works, strict=True):
            stage.passes.append(_part(stage, work, batch, ledger))
            base = ledger.mark() if number == 0 else base
    return stages, base


def _of(schedule: Any) -> list[Any]:
    """Return the stages of PyTorch's schedule."""
    return list(schedule._stages) if hasattr(schedule, "_stages") else [schedule._stage]


def _unshards(schedule: Any, place: int) -> tuple[int, ...]:
    """Return how often the schedule gathers the weights of each stage at `place`; 1F1B leaves that to FSDP, once."""
    table = getattr(schedule, "pipeline_order_with_comms", None)
    counts = Counter(action.stage_index for action in (table[place] if table else ())
                     if action.computation_type.name == "UNSHARD")
    return tuple(counts[work.stage_index] for work in _of(schedule))


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


def _part(stage: Stage, work: Any, batch: dict[str, Tensor], ledger: Ledger) -> Pass:
    """Return what a micro-batch does in a stage of a pipeline, without the exchange of gradients.

    work: PyTorch's own object, which knows what its neighbours send and expect.
    """
    root, expected = work.submod, work._user_meta
    x = batch["ids"] if work.is_first else _empty(expected.inputs[0]).requires_grad_()
    upstream = None if work.is_last else _empty(expected.outputs[0])
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
    stage.entered = 0 if work.is_first else _size(x)
    if upstream is not None:
        stage.sent = _size(upstream)
        if (out.shape, out.dtype) != (upstream.shape, upstream.dtype):
            stage.misfit = f"{out.dtype} {list(out.shape)} / {upstream.dtype} {list(upstream.shape)}".replace("torch.", "")
    return Pass(after - before, made[0], backward, (made[1], flops - made[1]), traffic)


def _empty(meta: Any) -> Tensor:
    return torch.empty(meta.shape, dtype=meta.dtype)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _close(model: Placed, ledger: Ledger) -> int:
    """Exchange the gradients of a pipeline's stages, as its schedule does at the end; return the bytes that needs."""
    before = ledger.mark()
    if model.pipe is not None:
        for stage in _of(model.pipe.schedule):
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

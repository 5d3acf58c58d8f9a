"""A config and a layout become this process's part of the model, in the one order that composes:

cut into stages → cut matrices → recompute → compile → shard over the data-parallel processes → give it memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from danlu.adapt import Adapter
from danlu.layout import Layout
from danlu.models import formed
from danlu.models.build import Config
from danlu.nn import placed
from danlu.nn.collective import Span, numbered
from danlu.nn.forms import Table
from danlu.nn.paths import Choice
from danlu.objectives.protocol import Objective
from danlu.parallel import context
from danlu.parallel.device import DTYPES, autocast
from danlu.parallel.world import World

if TYPE_CHECKING:
    from danlu.parallel.pipeline import Pipe


class Leaf(NamedTuple):
    """A parameter and the part of it that this process trains."""

    name: str
    param: nn.Parameter
    local: nn.Parameter             # shares the memory of `param`'s part; `param` itself where that is plain
    copies: int                     # processes that hold this very part


class Placed:
    """This process's part of the model: the whole, or stages; plain, or cut and sharded.  Names are the whole model's."""

    def __init__(self, parts: list[Any], world: World, *, roots: list[Any], pipe: Pipe | None = None,
                 span: Span | None = None) -> None:
        self.parts, self.world, self.roots, self.pipe, self.span = parts, world, roots, pipe, span
        self.call: nn.Module = roots[0]
        self.fresh: frozenset[str] = frozenset()         # weights that the model to start from did not have

    @property
    def whole(self) -> Any:
        """The model, where one process has all of its blocks."""
        return self.parts[0]

    @property
    def training(self) -> bool:
        return bool(self.parts[0].training)

    def train(self, mode: bool = True) -> Self:
        """Put every part into training mode, or evaluation."""
        for root in self.roots:
            root.train(mode)
        return self

    def eval(self) -> Self:
        """Put every part into evaluation mode."""
        return self.train(False)

    def use(self, choice: Choice) -> Self:
        """Compute by the paths of `choice` from now on."""
        for part in self.parts:
            part.use(choice)
        return self

    def init(self, seed: int) -> Self:
        """Fill in the random weights of the whole model's names."""
        for part in self.parts:
            part.init(seed)
        return self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are here, under the whole model's names, each once."""
        seen: set[str] = set()
        for part in self.parts:
            for name, parameter in part.named_parameters():
                if name not in seen:
                    seen.add(name)
                    yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are here."""
        return (parameter for _name, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights that are here; parts of them where they are sharded."""
        return {name: tensor for part in self.parts for name, tensor in part.state_dict().items()}

    def begin(self) -> Self:
        """Start the exchange of gradients, once the weights are filled in."""
        layout = self.world.layout
        if layout.dp * layout.cp > 1 and not self.sharded and layout.local is None:
            assert self.world.mesh is not None
            self.call = DistributedDataParallel(self.roots[0], process_group=self.world.mesh.get_group("replicate"),
                                                gradient_as_bucket_view=True)
        return self

    def reshard(self) -> None:
        """Let go of gathered weights: after a forward pass alone they would stay until the next backward pass."""
        if self.sharded:
            from torch.distributed.fsdp import FSDPModule

            for root in self.roots:
                for module in root.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    @property
    def sharded(self) -> bool:
        return hasattr(self.roots[0], "set_requires_gradient_sync")

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch's backward pass: gradients are exchanged after the last one alone."""
        if isinstance(self.call, DistributedDataParallel):
            return nullcontext() if last else self.call.no_sync()
        if self.pipe is None:
            for root in self.roots if self.sharded else ():
                root.set_requires_gradient_sync(last)
                if self.world.layout.shard == "grads":   # the weights stay whole until the step is over
                    root.set_reshard_after_backward(last)
        return nullcontext()

    def leaves(self) -> list[Leaf]:
        """Return what this process trains."""
        made, layout = [], self.world.layout
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = placed.local(parameter)
                own = parameter if type(parameter.data) is Tensor else nn.Parameter(part)
                copies = layout.world // layout.pp // placed.cuts(parameter)
                made.append(Leaf(name, parameter, own, copies * (2 if name in self.tied else 1)))
        return made

    @property
    def tied(self) -> tuple[str, ...]:
        """The parameters that the first and the last stage both have."""
        cfg = self.parts[0].cfg
        return ("embed.weight",) if self.world.layout.pp > 1 and cfg.tied else ()

    def partial(self) -> list[str]:
        """Return the names of gradients that are summands within a tensor-parallel group."""
        layout = self.world.layout
        if layout.tp == 1:
            return []
        from danlu.parallel import tensor

        return [name for part in self.parts for name in tensor.partial_names(part, sequence=layout.sequence)]


def place(cfg: Config, world: World, objective: Objective, *, precision: str, recompute: str | int = "none",
          compile: bool = False, length: int = 0, rows: int = 0, device: str | None = None,
          adapt: Adapter | None = None, table: Table = ()) -> Placed:
    """Return this process's part of the model that `cfg` describes, with memory and without weights.

    length, rows: of a micro-batch of one process.  device: "meta" gives no memory either.  adapt: what is trained in
    place of the whole.  table: layers that are not as `cfg` says, and their forms.
    """
    layout = world.layout
    if layout.pp > 1:
        return _stages(cfg, world, objective, precision=precision, recompute=recompute, compile=compile, length=length, rows=rows,
                       device=device, adapt=adapt, table=table)
    part = _made(cfg, precision, adapt, table)
    _cut(part, world)
    ready(part, recompute=recompute, compile=compile)
    if layout.dp * layout.cp > 1 and layout.local is None and (layout.shard != "none" or layout.tp > 1):
        shard(part, part, world, precision)
    _materialise(part, world, device)
    return Placed([part], world, roots=[part], span=context.attach(part, world, length))


def _stages(cfg: Config, world: World, objective: Objective, *, precision: str, recompute: str | int, compile: bool,
            length: int, rows: int, device: str | None, adapt: Adapter | None, table: Table) -> Placed:
    """Return this process's stages of a pipeline."""
    from danlu.parallel import pipeline

    layout = world.layout
    numbers = pipeline.mine(layout, world.index("pp"))
    blocks = pipeline.ranges_of(layout, cfg)
    parts, roots, span = [], [], None
    for number in numbers:
        part = _made(cfg, precision, adapt, table)
        pipeline.cut(part, number, blocks)
        _cut(part, world)
        ready(part, recompute=recompute, compile=compile)
        root = pipeline.Stage(part, objective, partial(autocast, precision, world.device))
        if layout.dp * layout.cp > 1:
            shard(part, root, world, precision)
        _materialise(root, world, device)
        span = context.attach(part, world, length)
        parts.append(part)
        roots.append(root)
    pipe = pipeline.Pipe(roots, numbers, world, rows=rows, tokens=length // layout.cp, width=cfg.width,
                         strip=layout.tp if layout.sequence else 1, dtype=DTYPES["fp64" if precision == "fp64" else "fp32"],
                         terms=len(objective.terms))
    return Placed(parts, world, roots=list(roots), pipe=pipe, span=span)


def _made(cfg: Config, precision: str, adapt: Adapter | None, table: Table) -> Any:
    made = formed.made(cfg, table)
    if adapt is not None:
        adapt.apply(made)
    return made.to(DTYPES["fp64" if precision == "fp64" else "fp32"])


def _cut(part: nn.Module, world: World) -> None:
    if world.layout.tp > 1:
        from danlu.parallel import tensor

        assert world.mesh is not None
        tensor.split(part, world.mesh["tp"], sequence=world.layout.sequence)


def _materialise(root: nn.Module, world: World, device: str | None) -> None:
    host = world.layout.offload and world.device.type != "cpu"
    root.to_empty(device=device or ("cpu" if host else world.device))


def alone(model: nn.Module, *, recompute: str | int = "none", compile: bool = False, micro: int = 1) -> Placed:
    """Return a model that one process has as a whole, made ready."""
    ready(model, recompute=recompute, compile=compile)
    return Placed([model], World(Layout(micro=micro), next(model.parameters()).device), roots=[model])


def ready(model: Any, *, recompute: str | int, compile: bool) -> None:
    """Let blocks recompute their activations, and compile them, in this order; one compiled block serves all: they share code."""
    every = {"none": 0, "full": 1}.get(recompute, recompute) if isinstance(recompute, str) else recompute
    for number, block in numbered(model.blocks):
        if every and number % int(every) == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True)
        if compile:
            block.compile(dynamic=False)


def shard(part: Any, root: nn.Module, world: World, precision: str) -> None:
    """Shard `part`, block by block, as `layout.shard` says; `root` is `part` or the stage around it."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    layout, mesh = world.layout, world.mesh
    assert mesh is not None
    across = mesh["shard"] if layout.shard in ("full", "grads") else mesh["replicate", "shard"]
    low = DTYPES[precision] if precision in ("bf16", "fp16") else None
    options: dict[str, Any] = {
        "mesh": across, "reshard_after_forward": layout.shard in ("full", "hybrid") and layout.pp == 1,
        "mp_policy": MixedPrecisionPolicy(low, torch.float32 if low else None, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if layout.offload and world.device.type != "cpu" else OffloadPolicy(),
    }
    for _number, block in numbered(part.blocks):
        fully_shard(block, **options)
    # embeddings, norms and head stay in fp32, as they do in one process: they make and end the residual stream
    fully_shard(root, **options | {"mp_policy": MixedPrecisionPolicy()})

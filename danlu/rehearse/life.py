"""The life of one process of a run on fake tensors: load, evaluate, a few steps, save, resume, with every block it takes.

The functions that train are run, one phase after the other; what they read from files is a mapping of so many bytes.
Pipelines are left out: their order of work is PyTorch's, and `rehearse` plays it through.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from danlu.adapt.folder import Base, Stored
from danlu.adapt.targets import kept
from danlu.nn import attention, paths
from danlu.parallel import DTYPES
from danlu.parallel.place import Placed
from danlu.rehearse.ledger import Event, Ledger, changed, following
from danlu.rehearse.trace import materialise, placed_as, process, stand_ins
from danlu.train import adapted, checkpoint
from danlu.train.recipe import Run
from danlu.train.step import Engine

BROADCAST = 250 * 2**20                                  # bytes that DDP sends at a time when it begins
FEW = 3                                                  # micro-batches of a step that are followed: first, usual, last


class Life(NamedTuple):
    """What a process does with memory, and the work of one of its steps."""

    events: list[Event]
    flops: int                                           # of matrix products, in a step
    moved: int                                           # bytes that all other operations of a step read and write


def life(run: Run, batch: dict[str, Tensor], held_out: dict[str, Tensor] | None, *, resumes: bool = False,
         copies: bool = True) -> Life:
    """Return what process 0 takes and frees, phase by phase: load, (resume,) evaluate, step, save, evaluate, save.

    run: settled.  batch: the rows of a step of one process, real tensors of the right shapes; held_out: those of a batch
    that is only measured.  resumes: it goes on from a checkpoint.  copies: a checkpoint is written on the way.
    Of many micro-batches FEW are followed: those after them hold no more, and do the same work again.
    """
    micro, every = min(run.layout.micro, FEW), run.layout.micro
    if micro < every:
        run = run.model_copy(update={"layout": run.layout.model_copy(update={"micro": micro}),
                                     "rows": run.step_rows // every * micro, "tokens": None, "micro_rows": None})
        batch = {name: column[:len(column) // every * micro] for name, column in batch.items()}
    with process(run.layout, 0) as world:
        model, twin = placed_as(run, world), placed_as(run, world)      # the second is what a checkpoint is tried on
        for module in (m for part in model.parts for m in part.modules()):
            if run.device != "cpu" and isinstance(module, attention.Attention):
                module.dropout = 0.0
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        ledger = Ledger(fake, {}, {})
        ledger.log, ledger.cpu = [], run.device == "cpu"
        with stand_ins(run), fake, following(ledger):
            one = _Process(run, model, ledger)
            given: dict[str, Tensor] = {name: fake.from_tensor(column) for name, column in batch.items()}
            told: dict[str, Tensor] | None = None
            if held_out is not None:
                told = {name: fake.from_tensor(column) for name, column in held_out.items()}
            one.load(given, twin, resumes=resumes)
            del twin
            renewed()                                    # what only a cycle holds would stay: it is older than `following`
            if not resumes:
                one.evaluate(told)
            one.steps(given)
            if copies:
                ledger.phase("save")
                one.spare = one.snapshot(own=True)
                one.puts_together()
                one.steps(given, number=1)
                ledger.maps(0)
            one.evaluate(told)
            ledger.phase("save")
            one.snapshot(own=False)
            one.puts_together()
        return Life(ledger.log, *(work * every // micro + rest for work, rest in one.work))


def renewed() -> None:
    """Collect garbage among the objects that are set apart, too."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def accelerated(run: Run) -> bool:
    """Return whether the run's device is not a CPU."""
    return run.device != "cpu"


class _Process:
    """A process and what it has made so far."""

    def __init__(self, run: Run, model: Placed, ledger: Ledger) -> None:
        self.run, self.model, self.ledger = run, model, ledger
        self.choice = paths.rule("cuda" if accelerated(run) else "cpu", DTYPES[run.precision], run.length,
                                 causal=run.network.causal)
        self.work = (0, 0), (0, 0)                       # FLOPs and bytes moved: of the passes, of the update
        self.exchanged = False                           # whether DDP exchanges gradients
        self.spare: Any = None                           # the copies of the last save that training did not wait for

    def load(self, batch: dict[str, Tensor], twin: Placed, *, resumes: bool) -> None:
        """Make the model, its weights, the engine and the optimizer; save, reload and compare, or resume."""
        run, ledger, model = self.run, self.ledger, self.model
        ledger.phase("load")
        begin(run, model, ledger)
        model.use(self.choice).train()
        if run.layout.dp * run.layout.cp > 1 and not model.sharded and run.layout.local is None:
            self.distribute()
        self.engine = Engine(model, run.objective, precision=run.precision, clip=run.clip, seed=run.seed)
        if self.exchanged:
            self.fill_buckets()
        self.optimizer = run.optim.build((leaf.name, leaf.local) for leaf in self.engine.leaves)
        self.ema = ({n: t.detach().clone() for n, t in model.state_dict().items()} if run.ema else None)
        if resumes:
            ledger.phase("making")                       # the optimizer's state, by a step that is not the run's
            self.resume()
        elif run.guard.reload:
            self.reload(batch, twin)

    def distribute(self) -> None:
        """Take what DDP takes when it begins: the parameters are sent in pieces, and the buckets of gradients are made."""
        sizes, piece = [p.numel() * p.element_size() for p in self.model.parameters()], 0
        for size in [*sizes, BROADCAST]:
            if piece + size > BROADCAST and piece:
                torch.empty(piece, dtype=torch.uint8)
                piece = 0
            piece += size
        self.exchanged = True

    def fill_buckets(self) -> None:
        """Let gradients end in DDP's buckets, of which they are views once the last micro-batch is exchanged."""
        for leaf in self.engine.leaves:
            buckets, times = list[Tensor](), count(1)    # nothing has touched its pages before the first gradient does

            def moved(param: Tensor, buckets: list[Tensor] = buckets, times: Iterator[int] = times) -> None:
                if not buckets:
                    buckets.append(torch.zeros_like(param))
                if next(times) % self.run.layout.micro == 0:
                    param.grad = buckets[0]

            leaf.param.register_post_accumulate_grad_hook(moved)

    def puts_together(self) -> None:
        """Write a part of the files, as each of several processes does, and map all, as the first does that makes one of them.

        DCP writes by safetensors: the bytes of each tensor, and then all of them in one piece.
        """
        world = self.run.layout.world
        if world == 1:
            return
        shares = [1 << 10]
        for tensors, whole in ((list(self.stored().values()), True), (self.slots(), not self.model.sharded)):
            sizes = [value.numel() * value.element_size() for value in tensors]
            most = 0 if self.model.sharded else max(sizes, default=0)        # of copies, one process writes a tensor whole
            shares.append(max(most, sum(sizes) // world) if whole else sum(sizes))
        torch.empty(2 * max(shares), dtype=torch.uint8)
        self.ledger.maps(_bytes(self.stored()))
        if self.model.sharded or self.run.layout.tp > 1:
            torch.empty(max(_bytes({name: value}) for name, value in self.stored().items()), dtype=torch.uint8)

    def slots(self) -> list[Tensor]:
        """Return what the optimizer holds beside the weights."""
        return [value for held in self.optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors of the model that a checkpoint holds."""
        held = self.model.state_dict()
        return {name: held[name] for name in kept(self.model, self.run.network)} if adapted.apart(self.run) else held

    def reload(self, batch: dict[str, Tensor], fresh: Placed) -> None:
        """Do as `check_reload`: a row through the model, and through a second one that is read from the checkpoint."""
        run, ledger = self.run, self.ledger
        row = {name: column[:1] for name, column in batch.items()}
        self.model.eval()
        with torch.no_grad():
            self.engine.sums(row)
            begin(run, fresh, ledger, fill=adapted.apart(run))
            size = _bytes(self.stored())
            ledger.maps(size)
            other = Engine(fresh.use(self.choice).eval(), run.objective, precision=run.precision, clip=None, seed=0)
            ledger.maps(0)
            other.sums(row)
        del fresh, other
        self.model.train()

    def resume(self) -> None:
        """Read model and optimizer from mapped files, the optimizer's state being copied out of them."""
        stored = _bytes(self.stored())
        self.ledger.maps(stored)
        for leaf in self.engine.leaves:
            leaf.local.grad = torch.zeros_like(leaf.local)
        self.engine.update(self.optimizer, 0.0, allow=lambda norm: True)
        self.ledger.phase("resume")
        self.ledger.maps(max(stored, sum(value.numel() * value.element_size() for value in self.slots())))
        self.ledger.phase("other")

    def evaluate(self, batch: dict[str, Tensor] | None) -> None:
        """Measure a batch of held-out rows."""
        if batch is None:
            return
        self.ledger.phase("evaluate")
        self.model.eval()
        with torch.no_grad():
            self.engine.sums(batch)
            self.run.objective.count(batch)
        self.model.train()

    def steps(self, batch: dict[str, Tensor], *, number: int = 2) -> None:
        """Take some steps; those after the first have the optimizer's state from the start."""
        self.ledger.phase("step")
        for step in range(number):
            self.ledger.flops = self.ledger.moved = 0
            self.engine.forward_backward(batch, step=step)
            passes = self.ledger.flops, self.ledger.moved
            self.engine.update(self.optimizer, 1e-3, allow=lambda norm: True)
            self.work = (passes[0], self.ledger.flops - passes[0]), (passes[1], self.ledger.moved - passes[1])

    def snapshot(self, *, own: bool) -> Any:
        """Copy the state as a save does: of an adapter that stands apart nothing else."""
        apart = Stored(self.run.adapt, Base(Path(), {})) if self.run.adapt is not None and adapted.apart(self.run) else None
        return checkpoint.snapshot(0, self.run.network, self.model, self.optimizer, ema=self.ema, state={}, facts={},
                                   tokenizer=None, own=own, adapter=apart)


def begin(run: Run, model: Placed, ledger: Ledger, *, fill: bool = True) -> None:
    """Give a model that is on the meta device memory and its first weights."""
    materialise(run, model)
    if not fill:
        return
    # this draws anew until no number is out of bounds; of fake numbers some always are
    with changed(torch.nn.init, "trunc_normal_", lambda tensor, *bounds, generator=None, **more: tensor.normal_()):
        model.init(run.seed)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

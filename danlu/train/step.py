"""The engine: rows to gradients, gradients to a step.  The only code that knows how a step is cut up.

Sums and counts come from the objective; the one division, by the count of the whole step over all processes, is here, so
that any split of the same rows gives the same loss and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Adam, Optimizer

from danlu import chance
from danlu.fault import fault
from danlu.nn import placed as tensors
from danlu.objectives.protocol import Batch, Objective, Out
from danlu.parallel import autocast, context
from danlu.parallel.place import Leaf, Placed
from danlu.train.probes import Probes
from danlu.train.zeros import Zeros


class Penalty(Protocol):
    """What the weights themselves cost, beside what the rows do."""

    def add(self, leaves: Sequence[Leaf]) -> Tensor:
        """Add its gradient to those of `leaves`; return this process's share of its value, each element counted once."""


class Engine:
    """This process's part in every step: `layout.micro` micro-batches of its rows.

    frozen: models by name, from a batch to what they say, which the objective asks in `enrich`.
    """

    def __init__(self, placed: Placed, objective: Objective, *, precision: str, clip: float | None, seed: int,
                 penalties: Sequence[Penalty] = (), frozen: Mapping[str, Any] | None = None,
                 probes: Probes | None = None) -> None:
        self.placed, self.objective, self.precision, self.clip, self.seed = placed, objective, precision, clip, seed
        self.penalties, self.frozen, self.penalty = penalties, frozen or {}, 0.0     # penalty: the value in the last step
        self.world, self.layout = placed.world, placed.world.layout
        self.device = self.world.device
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None
        self.leaves = [*placed.leaves(), *(probes.leaves() if probes is not None else ())]
        self.scales = torch.tensor(objective.scales, dtype=torch.float64)
        self.counts = torch.zeros(len(self.scales), dtype=torch.float64)     # [terms] of the last step, over all processes
        self.asked: Callable[[], bool] = lambda: False   # whether this process was asked to stop …
        self.stopping = False                            # … and whether any was, as of the last step
        self.probes = probes                             # make states as wide as a teacher's
        self.zeros: Zeros | None = None                  # weights that are 0, and stay so
        self.asleep: Callable[[str, int], bool] = lambda name, step: False      # parameters that do not learn yet, by step
        self.number = 0                                  # of the step whose gradients these are
        self.micro = self.layout.micro                   # micro-batches of a step; more of them once memory has run out
        partial = set(placed.partial())
        self._partial = [leaf for leaf in self.leaves if leaf.name in partial]
        self._tied = [leaf for leaf in self.leaves if leaf.name in placed.tied and self.world.ends is not None]
        copies = self.layout.dp * self.layout.cp
        # DDP and FSDP average over these processes, and the division by the count has been made already
        self._averaged = 1 if self.layout.local is not None else copies

    def to_device(self, batch: Batch) -> dict[str, Tensor]:
        """Return the batch where the model is, with the tokens that are this process's."""
        if self.device.type != "cpu":
            batch = {name: column.to(self.device, non_blocking=True) for name, column in batch.items()}
        return dict(context.cut(batch, self.placed.span, first=self.world.index("cp") == 0))

    def sums(self, batch: Batch) -> Tensor:
        """Return [terms] sums of the losses of this process's `batch` (forward only, under the current grad mode).

        In a pipeline they are 0 but in the last stage.
        """
        if self.placed.pipe is not None:
            self.placed.pipe.learn(self.objective)
            return self.placed.pipe.run(dict(batch), None)
        return self.objective.loss(self.outputs(batch), batch)

    def outputs(self, batch: Batch) -> Out:
        """Return what the model says of this process's `batch`; not in a pipeline, where no process has it all."""
        with autocast(self.precision, self.device):
            out = self.placed.call(**{name: batch[name] for name in self.objective.inputs if name in batch})
            return self.probes(out) if self.probes is not None else out     # type: ignore[no-any-return]

    def whole(self, column: Tensor, *, tokens: bool) -> Tensor:
        """Return a column of this process's rows as it is where no row is cut; tokens: it is of tokens [B, T, …]."""
        return context.whole(column, self.placed.span, self.world, tokens=tokens)

    def total(self, sums: Tensor) -> Tensor:
        """Return sums of this process's rows, of any shape, summed over all processes: each row and each token once."""
        return self.world.add(sums.double().cpu(), ("pp", "dp", "cp"))

    def forward_backward(self, batch: Batch, *, step: int) -> Tensor:
        """Add the gradient of the step's mean loss to `.grad`; return [terms] mean losses, float64 on the CPU.

        batch: this process's rows.  A term that nothing counts for (no pair in the batch, say) is 0 and adds nothing.
        """
        self.number = step
        batch = self.to_device(batch)
        own = self.objective.count(batch).double().cpu()
        self.counts = self._agree(own)
        counts = self.counts.clamp(min=1e-12)
        divisor = counts if self.layout.local is None else own.clamp(min=1e-12)
        weights = (self.scales / divisor * self._averaged).to(self.device)
        if self.placed.pipe is not None:
            self._seed(step, 0)
            self.placed.pipe.learn(self.objective)
            sums = self.placed.pipe.run(self._enriched(batch), self._scaled(weights))
        else:
            sums = self._micro_batches(batch, weights, step)
        return self.total(sums) / counts

    def _agree(self, counts: Tensor) -> Tensor:
        """Return the counts of all processes together; tell each other who was asked to stop by the same message."""
        if self.world.size == 1:
            self.stopping = self.asked()
            return counts
        told = self.world.add(torch.cat((counts, torch.tensor([float(self.asked())], dtype=torch.float64))), ("dp", "cp"))
        self.stopping = bool(self.world.add(told[-1:], ("pp", "tp")))       # who shares these rows counts the same
        return told[:-1]

    def _micro_batches(self, batch: Batch, weights: Tensor, step: int) -> Tensor:
        micro = self.micro
        size = batch["ids"].shape[0] // micro
        total = torch.zeros(len(self.scales), dtype=torch.float64, device=self.device)
        for number in range(micro):
            part = batch if micro == 1 else {k: v[number * size : (number + 1) * size] for k, v in batch.items()}
            self._seed(step, number)
            part = self.objective.enrich(part, self.frozen) if self.frozen else part
            with self.placed.exchanging(number == micro - 1):
                sums = self.sums(part)
                if fault("memory") == "oom":
                    raise torch.OutOfMemoryError("planted: out of memory")
                loss = (sums * weights.to(sums.dtype)).sum()
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            total += sums.detach().double()
        return total

    def _enriched(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch of a pipeline with what frozen models say, asked a micro-batch at a time, in the last stage."""
        if not self.frozen:
            return batch
        size = batch["ids"].shape[0] // self.layout.micro
        parts = [self.objective.enrich({k: v[at : at + size] for k, v in batch.items()}, self.frozen)
                 for at in range(0, batch["ids"].shape[0], size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _seed(self, step: int, number: int) -> None:
        """Seed dropout: by the step and the micro-batch, and differently where other rows, tokens or blocks are."""
        place = tuple(self.world.index(axis) for axis in ("dp", "cp", "pp"))
        seed = chance.torch_seed(self.seed, "dropout", (step, number, *(place if any(place) else ())))
        torch.default_generator.manual_seed(seed)            # torch.manual_seed is slow: it notes the stack
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _scaled(self, weights: Tensor) -> Tensor:
        return weights if self.scaler is None else self.scaler.scale(weights)

    def update(self, optimizer: Optimizer, lr: float, *, allow: Callable[[float], bool]) -> float:
        """Clip, ask `allow(norm)`, step and clear the gradients; return the norm before clipping, over all processes."""
        self.gather()
        if self.scaler:
            self.scaler.unscale_(optimizer)
        if fault("grad") == "nan":
            self.leaves[0].local.grad.fill_(float("nan"))        # type: ignore[union-attr]
        if self.penalties:
            value = torch.stack([penalty.add(self.leaves) for penalty in self.penalties]).sum()
            self.penalty = float(self.world.add(value.reshape(1)))
        if self.zeros is not None:
            self.zeros.hold()
        own = self._share()
        norm = self._global(own)
        if self.scaler and self.world.size > 1:              # each process looks at its own part: all must skip together
            for found in self.scaler._found_inf_per_device(optimizer).values():
                found.fill_(float(not math.isfinite(norm)))
        clipped = float(own.sqrt()) if self.layout.local is not None else norm      # replicas that step alone clip alone
        if self.clip is not None and clipped > 0:
            self._shrink(optimizer, self.clip / (clipped + 1e-6))
        if allow(norm):
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if getattr(optimizer, "grad_scale", None) is not None and not self.scaler:
            optimizer.grad_scale = None                      # type: ignore[attr-defined]
        if self.probes is not None:
            self.probes.stow(optimizer)
        if self.scaler:
            self.scaler.update()
        if self.zeros is not None:
            self.zeros.settle(optimizer, self.number + 1)
        for leaf in self.leaves:
            leaf.param.grad = leaf.local.grad = None
        return norm

    def _shrink(self, optimizer: Optimizer, share: float) -> None:
        """Multiply the gradients by `share`, if it is below 1; PyTorch's fused Adam does so itself on a CPU, in its one pass."""
        if not share < 1.0:
            return
        alone = self.device.type == "cpu" and not self.scaler and share > 0
        if alone and isinstance(optimizer, Adam) and optimizer.defaults["fused"]:
            optimizer.grad_scale = torch.tensor(1 / share)      # type: ignore[attr-defined]
        else:
            torch._foreach_mul_([leaf.local.grad for leaf in self.leaves if leaf.local.grad is not None], share)    # type: ignore[arg-type]

    def gather(self) -> None:
        """Give the optimizer's parameters this process's part of the gradients, complete."""
        for leaf in self.leaves:
            grad = leaf.param.grad
            if leaf.local is not leaf.param and grad is not None:
                placements = getattr(leaf.param, "placements", None)
                if tensors.is_part(grad) and grad.placements != placements:        # of an embedding: it has all rows
                    grad = grad.redistribute(placements=placements)
                leaf.local.grad = tensors.local(grad)
            if self.asleep(leaf.name, self.number):
                leaf.local.grad = None
        if self._partial:
            self._add([leaf.local for leaf in self._partial], "tp")
        if self.probes is not None:
            self.probes.gather(self._averaged)
        if self._tied and self.world.ends is not None:
            for leaf in self._tied:
                torch.distributed.all_reduce(leaf.local.grad, group=self.world.ends)

    def _add(self, parameters: Sequence[Tensor], axis: str) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:                                    # all of them asleep, in every process
            return
        flat = _flatten_dense_tensors(grads)
        torch.distributed.all_reduce(flat, group=self.world.group(axis))
        for grad, whole in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
            grad.copy_(whole)

    def norm(self) -> float:
        """Return the norm of the whole gradient; called by all processes, after `gather`."""
        return self._global(self._share())

    def _share(self) -> Tensor:
        """Return this process's share of the squared norm of the whole gradient, float64; all of it in a lone replica.

        Every element counts once, however many processes hold it.
        """
        grads = [(leaf.local.grad, leaf.copies) for leaf in self.leaves if leaf.local.grad is not None and leaf.local.numel()]
        if not grads:
            return torch.zeros((), dtype=torch.float64)
        squares = torch.stack(torch._foreach_norm([grad for grad, _copies in grads])).double().square()
        if self.world.size > 1 and self.layout.local is None:
            squares /= torch.tensor([copies for _grad, copies in grads], dtype=torch.float64, device=squares.device)
        return squares.sum()

    def _global(self, own: Tensor) -> float:
        """Return the norm over all processes; of replicas that step alone, the root of the mean square."""
        total = self.world.add(own.reshape(1).clone())
        return float(total.div(self.layout.dp if self.layout.local is not None else 1).sqrt())

"""Pipeline parallelism: the blocks are cut into stages, and micro-batches follow each other through them.

The order of work is PyTorch's (`torch.distributed.pipelining`).  All columns of a batch go to every stage as keywords; the last
one computes the objective's sums itself, so that nothing but activations travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    _PipelineSchedule,
)

from danlu.adapt.layers import LoRAEmbedding
from danlu.layout import Layout
from danlu.models.build import Config, build
from danlu.nn.collective import numbered
from danlu.objectives.protocol import Objective
from danlu.parallel.world import World

ORDERS: dict[str, Any] = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}


def ranges_of(layout: Layout, cfg: Config) -> list[range]:
    """Return the blocks of each stage of the model that `cfg` describes."""
    return bounds(layout, cfg.layers, head=head_cost(build(cfg)))


def bounds(layout: Layout, layers: int, *, head: float = 1.0) -> list[range]:
    """Return the blocks of each stage: as `layout.stages` says, or evened out by cost; each stage has at least one.

    head: what the vocabulary's projection costs in blocks; it counts in the last stage.
    """
    count = layout.stage_count
    sizes = list(layout.stages) if layout.stages is not None else _even(layers, count, head)
    starts = [sum(sizes[:i]) for i in range(count)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def head_cost(model: Any) -> float:
    """Return what the vocabulary's projection costs in blocks of `model`, by the weights that multiply a token."""
    _number, block = next(numbered(model.blocks))
    table = model.embed.weight.numel()
    # a decoder's head reads every token, an encoder's those that are hidden: about 15 %
    return (1.0 if model.cfg.kind == "decoder" else 0.15) * table / sum(p.numel() for p in block.parameters())


def _even(layers: int, count: int, head: float) -> list[int]:
    """Return sizes whose largest cost is least, the most even of those: the last stage bears the head beside its blocks."""
    def cost(sizes: list[int]) -> tuple[float, float, int]:
        costs = [*sizes[:-1], sizes[-1] + head]
        return max(costs), sum(each**2 for each in costs), max(sizes) - min(sizes)

    found = []
    for last in range(1, layers - count + 2):
        rest, parts = layers - last, count - 1
        found.append([rest // parts + (i < rest % parts) for i in range(parts)] + [last])
    return min(found, key=cost)


def cut(model: Any, number: int, blocks: Sequence[range]) -> None:
    """Leave in `model` (on the meta device) what stage `number` needs, in place; names of parameters stay.

    A tied embedding stays in the first and the last stage.
    """
    first, last = number == 0, number == len(blocks) - 1
    model.blocks = nn.ModuleDict({str(i): block for i, block in numbered(model.blocks) if i in blocks[number]})
    model.last = last
    if not first:
        for name in ("position", "types", "embed_norm"):
            if hasattr(model, name):
                setattr(model, name, None)
    if not first and not (last and model.cfg.tied):
        model.embed = None
    elif not first and isinstance(model.embed, LoRAEmbedding):
        model.embed.strip()                              # a head reads the table alone
    if not last:
        for name in ("norm", "head", "pooler"):
            if hasattr(model, name):
                setattr(model, name, None)
        for name in ("pairs", "heads"):
            if hasattr(model, name):
                setattr(model, name, nn.ModuleDict())


def mine(layout: Layout, index: int) -> list[int]:
    """Return the stages of process `index` of the pipeline."""
    return list(range(index, layout.stage_count, layout.pp))


class Stage(nn.Module):
    """A stage as the pipeline calls it: activations in, activations or the objective's sums [terms] out."""

    def __init__(self, part: Any, objective: Objective, context: Callable[[], Any]) -> None:
        super().__init__()
        self.part, self.objective, self.context = part, objective, context

    def forward(self, x: Tensor, **batch: Tensor) -> Tensor:
        """Return the next stage's x [B, T, D], in the last stage [terms] sums."""
        wanted = {name: batch[name] for name in self.objective.inputs if name in batch and name != "ids"}
        with self.context():
            out = self.part(x, **wanted)
        return self.objective.loss(out, batch) if self.part.last else out


class Pipe:
    """The stages of this process and the order in which they work."""

    def __init__(self, stages: Sequence[Stage], numbers: Sequence[int], world: World, *, rows: int, tokens: int, width: int,
                 strip: int, dtype: torch.dtype, terms: int) -> None:
        """rows, tokens: of a micro-batch in this process; strip: processes that its activations are cut over between stages."""
        self.world, layout = world, world.layout
        self.stages, self.terms = stages, terms
        self.weights = torch.ones(terms)
        self.sums: list[Tensor] = []
        count = layout.stage_count
        between = torch.empty(rows, tokens // strip, width, dtype=dtype, device="meta")
        made = [PipelineStage(
            stage, number, count, world.device, group=world.group("pp"),
            input_args=torch.empty(rows, tokens, dtype=torch.int64, device="meta") if number == 0 else between.requires_grad_(),
            output_args=torch.empty(terms, device="meta") if number == count - 1 else between.requires_grad_(),
        ) for stage, number in zip(stages, numbers, strict=True)]
        self.first, self.last = 0 in numbers, count - 1 in numbers
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        self.schedule: _PipelineSchedule = (
            Schedule1F1B(made[0], layout.micro, **options) if len(made) == 1
            else ORDERS[layout.pipeline](made, layout.micro, **options))

    def learn(self, objective: Objective) -> None:
        """Let the last stage compute the sums of `objective` from now on."""
        for stage in self.stages:
            stage.objective = objective
        self.terms = len(objective.terms)

    def _loss(self, sums: Tensor, _target: Tensor) -> Tensor:
        self.sums.append(sums.detach())
        return (sums * self.weights.to(sums)).sum()

    def run(self, batch: dict[str, Tensor], weights: Tensor | None) -> Tensor:
        """Return [terms] sums of the batch (zeros outside of the last stage); with weights [terms], make the gradients, too."""
        self.sums = []
        rest: dict[str, Any] = {name: column for name, column in batch.items() if name != "ids"}
        given = (batch["ids"],) if self.first else ()
        target: dict[str, Any] = {"target": batch["ids"][:, 0]} if self.last else {}
        if weights is not None:
            self.weights = weights
            self.schedule.step(*given, **target, **rest, return_outputs=False)
        else:
            self.weights = torch.ones(self.terms)
            self.schedule.eval(*given, **target, **rest)
        total = torch.zeros(self.terms, dtype=torch.float64, device=self.world.device)
        return total + torch.stack(self.sums).double().sum(0) if self.sums else total

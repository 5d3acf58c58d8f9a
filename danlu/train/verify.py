"""Does a layout change anything?  The same rows in one process and under the layout: losses, norms, gradients, step by step.

The reference writes the gradients of each step to a file; every process of the layout compares what it holds with its
part of them.  Both in float64 by default, so that a difference is a mistake and not rounding.  Dropout is off: masks
are the one thing that a layout does change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from danlu import files, parallel, tensorfile
from danlu.adapt.lora import LoRA
from danlu.errors import ConfigError, NumericError
from danlu.layout import Layout
from danlu.log import silence
from danlu.nn import placed
from danlu.parallel import World
from danlu.parallel.place import Leaf
from danlu.train.feed import Steps
from danlu.train.recipe import Run
from danlu.train.setup import assemble, make_model, open_data, settle
from danlu.train.step import Engine
from danlu.words import _

# Share of the gradient's norm below which a parameter's gradient is rounding: that of a key's bias, say, is 0 to mathematics,
# since softmax does not see it.
NOTHING = {"fp64": 1e-9, "fp32": 1e-3}


@dataclass(frozen=True)
class Seen:
    """A step before its update: [terms] losses, the norm, and this process's part of the gradient."""

    losses: Tensor
    norm: float
    gradients: dict[str, Tensor]


def look(run: Run, world: World, steps: int, precision: str) -> Iterator[tuple[Engine, Seen]]:
    """Train `steps` steps as `run` says, without dropout, and yield what each was."""
    data = open_data(run)
    run, choice = settle(run.model_copy(update={"precision": precision}), data, world, None)
    if run.network.kind == "foreign":
        raise ConfigError(_("{family} is a model of transformers, whose dropout is not turned off here").format(
            family=run.network.family), where="start", fix=_("compare the losses of two runs in metrics.jsonl"))
    still = {name: 0.0 for name in ("dropout", "attention_dropout")}
    run = run.model_copy(update={"model": run.network.model_copy(update=still)})
    if isinstance(run.adapt, LoRA):
        run = run.model_copy(update={"adapt": run.adapt.model_copy(update={"dropout": 0.0})})
    work = assemble(run, data, make_model(run, choice, world))
    engine = work.engine
    feed = iter(Steps(work.rows, run.objective, data.tokenizer.special, per_step=run.step_rows, length=run.length,
                      seed=run.seed, position=work.progress.position, share=(world.index("dp"), run.layout.dp), tight=run.tight))
    for step in range(steps):
        batch, _after = next(feed)
        losses = engine.forward_backward(batch, step=step)
        gradients: dict[str, Tensor] = {}

        def keep(norm: float, gradients: dict[str, Tensor] = gradients) -> bool:
            share = min(1.0, run.clip / (norm + 1e-6)) if run.clip is not None and norm > 0 else 1.0
            gradients |= {leaf.name: leaf.local.grad / share for leaf in engine.leaves if leaf.local.grad is not None}
            return True

        norm = engine.update(work.optimizer, work.plan.lr * work.plan.schedule.at(step, work.plan.total), allow=keep)
        if not math.isfinite(norm):                      # a NaN is larger than nothing: it would look like agreement
            raise NumericError(_("loss {loss} or gradient norm {norm} is not finite").format(
                loss=float((losses * engine.scales).sum()), norm=norm), where=_("step {step}").format(step=step))
        yield engine, Seen(losses, norm, gradients)


def reference(run: Run, folder: Path, steps: int, precision: str) -> None:
    """Write what one process does to `folder`."""
    layout = Layout()
    rows = {"rows": run.step_rows, "tokens": None, "micro_rows": None}
    alone = run.model_copy(update={"layout": layout, **rows})
    world = World(layout, parallel.start(threads=run.threads, device=run.device, allocator=run.allocator))
    for number, (_engine, seen) in enumerate(look(alone, world, steps, precision)):
        tensorfile.write(folder / f"{number}.safetensors", {n: g.cpu() for n, g in seen.gradients.items()})
        files.write_json(folder / f"{number}.json", {"losses": seen.losses.tolist(), "norm": seen.norm})


def compare(run: Run, folder: Path, steps: int, precision: str) -> None:
    """Write to `folder` how far the layout is from the reference there; called in each of its processes."""
    world = parallel.join(run.layout, parallel.start(threads=run.threads, device=run.device, allocator=run.allocator))
    silence(not world.main)
    made: list[dict[str, Any]] = []
    for number, (engine, seen) in enumerate(look(run, world, steps, precision)):
        told = files.read_json(folder / f"{number}.json")
        losses = torch.tensor(told["losses"], dtype=torch.float64)
        file = folder / f"{number}.safetensors"
        least = NOTHING[precision] * told["norm"]
        apart = {leaf.name: _apart(seen.gradients.get(leaf.name), leaf, file, least) for leaf in engine.leaves}
        # the largest difference of any process, by name: stages hold different parameters
        names = sorted(_names(file))
        largest = world.most(torch.tensor([apart.get(name, 0.0) for name in names], dtype=torch.float64))
        made.append({"loss": float(((seen.losses - losses).abs() / losses.abs().clamp(min=1e-12)).max()),
                     "norm": abs(seen.norm - told["norm"]) / told["norm"],
                     "gradients": dict(zip(names, largest.tolist(), strict=True))})
    if world.main:
        files.write_json(folder / "result.json", {"steps": made})
    parallel.leave()


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _apart(mine: Tensor | None, leaf: Leaf, path: Path, least: float) -> float:
    """Return the largest difference of this process's part of a gradient, relative to the gradient's largest element."""
    with safe_open(path, framework="pt") as file:
        there = file.get_slice(leaf.name)[:]
    part = there[placed.extent(leaf.param).slices]
    if mine is None or not part.numel():
        return 0.0 if not part.numel() else 1.0
    return float((mine.cpu() - part).abs().max()) / max(float(there.abs().max()), least)

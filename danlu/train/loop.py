"""The loop: batch, gradients, judgement, update; and what happens every so many steps."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu import files
from danlu.errors import NumericError, Stopped
from danlu.evaluate.loss import Loss
from danlu.fault import fault
from danlu.log import LiveLine, Metrics, count, duration, say
from danlu.schedule import Schedule
from danlu.train import guard as guards
from danlu.train.feed import Fed
from danlu.train.guard import Guard
from danlu.train.signals import Asked
from danlu.train.step import Engine
from danlu.words import _


@dataclass
class Progress:
    """How far a run is: all that a checkpoint needs beside tensors."""

    step: int = 0
    position: Any = None
    tokens: int = 0                                      # tokens that carried loss
    best: float | None = None
    best_step: int | None = None
    waited: int = 0                                      # evaluations without improvement
    evaluation: dict[str, float] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)   # the guard's
    skipped: int = 0

    def record(self) -> dict[str, Any]:
        """Return the progress as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What the loop is asked to do; plain values and functions, so that the loop knows no files and no formats."""

    total: int
    lr: float
    schedule: Schedule
    log: int
    evaluate: int
    save: int
    sample: int
    best: bool                                           # save when an evaluation is the best so far
    patience: int | None
    min_delta: float
    metric: str
    flops: float                                         # of one step, forward and backward
    peak: float                                          # measured FLOP/s of this device, 0 = unknown


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out for."""

    measure: Callable[[], Loss | None]                   # loss on held-out rows
    save: Callable[[Progress, bool], None]               # (progress, wait for the disk)
    saved: Callable[[], str]                             # '12s' since the last checkpoint, or ''
    poll: Callable[[], None]                             # tells failures of saves under way
    sample: Callable[[], None]
    after_update: Callable[[], None]                     # averaged weights


def fit(engine: Engine, optimizer: Optimizer, feed: Iterator[Fed], plan: Plan, hooks: Hooks, guard: Guard,
        progress: Progress, metrics: Metrics, recorded: dict[int, str], asked: Asked, out: Path) -> Progress:
    """Train from `progress` to `plan.total` steps, or until the patience ends or a signal asks; return the progress."""
    live, clock = LiveLine(), _Clock()
    moved_at = min(plan.total, _warm(plan) + guards.MOVED_AFTER)
    before = guards.fingerprint(engine.model)
    if progress.step == 0:
        _evaluate(plan, hooks, progress, metrics)
    while progress.step < plan.total:
        step = progress.step
        batch, position = next(feed)
        counts = engine.objective.count(batch)
        guards.check_counts(counts, step=step)
        fault("train.step")
        losses = engine.forward_backward(batch, step=step)
        if fault("loss") == "scale50":
            losses = losses * 50
        loss = float((losses * engine.scales).sum())
        guards.check_replay(recorded.pop(step + 1, None), loss, step=step + 1)
        lr = plan.lr * plan.schedule.at(step, plan.total)
        norm = _update(engine, optimizer, lr, loss, guard, step, batch, out)
        hooks.after_update()
        progress.step, progress.position = step + 1, position
        progress.tokens += int(counts[0])
        progress.history, progress.skipped = list(guard.history), guard.skipped
        clock.step(int(batch["ids"].numel()))
        if progress.step == moved_at and not guard.skipped:
            guards.check_moved(before, engine.model, step=progress.step)
        if progress.step % plan.log == 0 or progress.step == plan.total or guard.reason:
            metrics.write(progress.step, _values(engine, losses, loss, lr, norm, guard, plan, clock, progress))
        live.show(_line(plan, progress, loss, lr, norm, clock, hooks.saved()), force=progress.step == plan.total)
        hooks.poll()
        if _due(progress.step, plan.sample, plan.total):
            hooks.sample()
        if (_due(progress.step, plan.evaluate, plan.total) or progress.step == plan.total) and _evaluate(
                plan, hooks, progress, metrics):
            live.end()
            say(_("stopped early at step {step}: {metric} has not fallen for {n} evaluations").format(
                step=progress.step, metric=plan.metric, n=progress.waited))
            break
        best = plan.best and progress.best_step == progress.step
        if _due(progress.step, plan.save, plan.total) or (best and progress.step < plan.total):
            hooks.save(progress, False)
        if asked.signal:
            live.end()
            hooks.save(progress, True)
            raise Stopped(_("stopped by a signal at step {step}; the same command goes on from there").format(
                step=progress.step), signal=asked.signal)
    live.end()
    return progress


def _warm(plan: Plan) -> int:
    """Return the first step whose learning rate is at least half of what the schedule reaches."""
    factors = [plan.schedule.at(step, plan.total) for step in range(min(plan.total, 100_000))]
    return next(step for step, factor in enumerate(factors) if factor >= 0.5 * max(factors))


def _due(step: int, every: int, total: int) -> bool:
    return bool(every) and step % every == 0 and step < total


def _update(engine: Engine, optimizer: Optimizer, lr: float, loss: float, guard: Guard, step: int,
            batch: dict[str, Tensor], out: Path) -> float:
    """Let the engine update if the guard allows it; a batch that stops the run is dumped first."""
    try:
        norm = engine.update(optimizer, lr, allow=lambda n: guard.allow(
            loss, n, step=step + 1, scaler=engine.scaler is not None))
    except NumericError:
        dumped = {name: column.tolist() for name, column in batch.items()}
        files.write_json(out / "failed-batch.json", {"step": step + 1, "batch": dumped})
        say(_("the batch is in {file}").format(file=out / "failed-batch.json"))
        raise
    if guard.reason:
        say(_("step {step}: update skipped: {why}").format(step=step + 1, why=guard.reason))
    return norm


def _evaluate(plan: Plan, hooks: Hooks, progress: Progress, metrics: Metrics) -> bool:
    """Measure, write, keep the best; return whether patience has ended."""
    measured = hooks.measure()
    if measured is None:
        return False
    values = measured.values("eval/")
    metrics.write(progress.step, values)
    progress.evaluation = values
    value = values.get(plan.metric, values["eval/loss"])
    if progress.best is None or value < progress.best - plan.min_delta:
        progress.best, progress.best_step, progress.waited = value, progress.step, 0
        return False
    progress.waited += 1
    return plan.patience is not None and progress.waited >= plan.patience


class _Clock:
    """Tokens and steps a second, smoothed over about the last 20 steps."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.seconds, self.tokens = 0.0, 0.0

    def step(self, tokens: int) -> None:
        now = time.perf_counter()
        share = 0.05 if self.seconds else 1.0
        self.seconds += share * (now - self.last - self.seconds)
        self.tokens += share * (tokens - self.tokens)
        self.last = now

    @property
    def speed(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def memory() -> int:
    """Return the bytes in use: the peak on CUDA, the resident peak of the process elsewhere."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _values(engine: Engine, losses: Tensor, loss: float, lr: float, norm: float, guard: Guard, plan: Plan,
            clock: _Clock, progress: Progress) -> dict[str, float | int | str]:
    values: dict[str, float | int | str] = {
        "train/loss": loss, "grad_norm": norm, "learning_rate": lr, "tokens_per_second": round(clock.speed, 1),
        "memory/max_alloc": memory(), "tokens": progress.tokens, "spike_score": guard.score(loss),
    }
    if len(losses) > 1:
        values |= {f"train/{name}_loss": float(value) for name, value in zip(engine.objective.terms, losses, strict=True)}
    if plan.peak:
        values["mfu"] = round(plan.flops / max(clock.seconds, 1e-9) / plan.peak, 4)
    if engine.scaler is not None:
        values["loss_scale"] = float(engine.scaler.get_scale())
    if guard.reason:
        values["skipped"] = guard.skipped
    return values


def _line(plan: Plan, progress: Progress, loss: float, lr: float, norm: float, clock: _Clock, saved: str) -> str:
    left = (plan.total - progress.step) * clock.seconds
    val = progress.evaluation.get("eval/loss", math.nan)
    parts = [
        _("step {step}/{total} {percent:.0f}%").format(step=progress.step, total=plan.total,
                                                      percent=100 * progress.step / plan.total),
        _("loss {loss:.4f}").format(loss=loss), _("val {val:.4f}").format(val=val) if val == val else "",
        f"lr {lr:.2e}", _("grad {norm:.2f}").format(norm=norm), f"{count(clock.speed)} tok/s",
        f"{memory() / 1e6:.0f} MB", _("ETA {time}").format(time=duration(left)),
        _("saved {age} ago").format(age=saved) if saved else "",
    ]
    return " · ".join(part for part in parts if part)
